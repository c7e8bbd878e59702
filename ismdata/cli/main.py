"""The command line: options in, one call, errors out.

Heavy imports stand inside the commands, so that `ismdata --help` is quick.
"""

from __future__ import annotations

import datetime
import signal
from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import Dedup, History, Layout, Mask, OverLong, Paths, Preference, Side, TokenizerBackend, TrainOn
from ismdata.cli.bench import bench_app
from ismdata.cli.chat import chat
from ismdata.cli.common import AsJson, Output, Overwrite, Workers, explained, show
from ismdata.cli.eval import eval_command
from ismdata.cli.template import template_command
from ismdata.cli.train import train_command
from ismdata.display import TerminalReporter, note
from ismdata.errors import Terminated, UsageError

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
app.add_typer(bench_app, name="bench")


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
        Paths, typer.Option(help="Trees of messages: every path to a leaf, or the best-ranked one.")
    ] = "all",
    preference: Annotated[
        Preference | None, typer.Option(help="Which side of preference data (DPO, KTO) to read.")
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Make one message of several that one side sends in a row.")
    ] = False,
    dedup: Annotated[
        Dedup | None,
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
    from ismdata.cli.views import reports
    from ismdata.convert import Cleaning, Selection, convert, explained_sources

    if explain:
        for explanation in explained_sources(
            sources, format=format_, mapping=mapping, roles=_roles(role or []), assistant=assistant
        ):
            show(reports.explanation(explanation), as_json=as_json)
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
    with TerminalReporter() as reporter:
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
            processes=True,
            overwrite=overwrite,
            progress=lambda done, total: reporter.progress("convert", done, total),
        )
    show(reports.convert_report(report), as_json=as_json)


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
    train_on: Annotated[
        TrainOn,
        typer.Option(
            help="Of the answers that messages' own flags leave: train all, the last one of each conversation, or all "
            "without their reasoning."
        ),
    ] = "all",
    layout: Annotated[
        Layout,
        typer.Option(help="glm: [MASK] and [START] before answers, two positions a token (for glm-tiny, glm-small)."),
    ] = "plain",
    glm_mask_token: Annotated[
        str | None, typer.Option(help="The control token that is [MASK]. Default: the tokenizer's own.")
    ] = None,
    glm_start_token: Annotated[
        str | None, typer.Option(help="The control token that is [START]. Default: the tokenizer's own.")
    ] = None,
    tokenizer_backend: Annotated[
        TokenizerBackend,
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
    from ismdata.cli.views import reports
    from ismdata.pack import pack
    from ismdata.rendering import DEFAULT_DATE, parse_arguments

    with TerminalReporter() as reporter:
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
            train_on=train_on,
            layout=layout,
            glm_mask_token=glm_mask_token,
            glm_start_token=glm_start_token,
            tokenizer_backend=tokenizer_backend,
            workers=workers,
            seed=seed,
            overwrite=overwrite,
            notify=note,
            progress=reporter.progress,
        )
    show(reports.pack_report(report), as_json=as_json)


@app.command()
@explained
def verify(
    folder: Annotated[Path, typer.Argument(help="A converted or packed folder.")],
    conversations: Annotated[
        list[Path] | None,
        typer.Option(
            help="For a packed folder: a converted folder that it was made of. Decodes every row and looks for every "
            "text in its place. Several times."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a folder: files against its index, and every invariant on every row. Exit code 1 where one is broken.

    With --conversations also that no text of theirs was lost, and none trained that should not be.
    """
    from ismdata.cli.views import reports
    from ismdata.data import verify
    from ismdata.pack import with_texts

    report = verify(folder)
    if conversations and report.ok:
        with TerminalReporter() as reporter:
            report = with_texts(report, conversations, progress=reporter.progress)
    show(reports.verify_report(report), as_json=as_json)
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
    from ismdata.cli.views import folders as view

    if row is None:
        show(view.folder_summary(folder), as_json=as_json)
    else:
        from ismdata.rendering import ConversationEncoder

        show(
            view.row(folder, row, decode=lambda: ConversationEncoder.load(folder / "tokenizer").decode), as_json=as_json
        )


app.command("template")(explained(template_command))
app.command("train")(explained(train_command))
app.command("eval")(explained(eval_command))
app.command("chat")(explained(chat))


@app.command()
@explained
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Walk the whole road on the bundled sample: no network, no GPU, a few minutes."""
    from ismdata.cli.demo import run_demo

    run_demo(output, overwrite=overwrite)


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
