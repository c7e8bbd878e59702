"""`ismdata convert`: read raw corpora into a folder of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import Dedup, Paths, Preference, Side
from ismdata.cli.common import AsJson, Overwrite, Workers, show
from ismdata.display import TerminalReporter
from ismdata.errors import UsageError


def convert_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, hub names, converted folders or - (standard input); with :SPLIT, one split of "
            "it. JSON Lines, JSON, CSV, TSV, YAML, Parquet or "
            "text; plain, compressed (gz, zst, bz2, xz) or in archives (zip, tar)."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. It appears only when it is complete.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="The corpus format; auto: detect it from the content.")
    ] = "auto",
    mapping: Annotated[
        Path | None,
        typer.Option(help="A TOML file that describes a format of your own; --explain prints one to start from."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Write nothing; show the detected format, the first conversation and a mapping."
        ),
    ] = False,
    role: Annotated[list[str] | None, typer.Option(help="Map a role name, e.g. bot=assistant. Repeatable.")] = None,
    assistant: Annotated[
        Side | None,
        typer.Option(
            help="Which speaker is trained in a dialogue of two people without an assistant: the second (default), "
            "the first, or both (one conversation for each)."
        ),
    ] = None,
    tree: Annotated[
        Paths, typer.Option(help="For trees of messages: read every path to a leaf, or only the best-ranked one.")
    ] = "all",
    preference: Annotated[
        Preference | None, typer.Option(help="Which answers of preference data (DPO, KTO) to read.")
    ] = None,
    join: Annotated[bool, typer.Option("--join", help="Join consecutive messages of one role into one.")] = False,
    dedup: Annotated[
        Dedup | None,
        typer.Option(help="Drop conversations that repeat an earlier one exactly, or nearly (MinHash)."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Drop conversations that are also in this corpus, e.g. a test set. Repeatable."),
    ] = None,
    min_turns: Annotated[
        int, typer.Option(help="Drop conversations with fewer user and assistant messages than this.")
    ] = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Drop conversations in which a message matches. Repeatable."),
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Keep this many conversations, chosen at random.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Split into train and validation (and test), e.g. 98/2 or 0.9/0.05/0.05, each a folder inside the "
            "output. Equal conversations are never separated.",
        ),
    ] = None,
    splits: Annotated[
        str,
        typer.Option(
            metavar="keep|merge|NAMES",
            help="Splits that the sources name, such as train and test: keep each in a folder of its own, merge them, "
            "or read only some (train,test). SOURCE:NAME reads one split of one source.",
        ),
    ] = "keep",
    workers: Workers = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Read raw corpora into a folder of conversations; splits that they have (train, test, …) are kept apart in it.

    Each record becomes a conversation, or a line of quarantine.jsonl with the reason: read = written + quarantined.
    After a crash, run the same command again to resume.
    """
    from ismdata.cli.views import reports
    from ismdata.convert import Cleaning, ConvertOptions, Selection, convert, explain_sources

    if explain:
        reading = ConvertOptions(format=format_, mapping=mapping, roles=_roles(role or []), assistant=assistant)
        for explanation in explain_sources(sources, reading):
            show(reports.explanation(explanation), as_json=as_json)
        return
    if output is None:
        raise UsageError("no output given; expected --output FOLDER, or --explain to write nothing")
    options = ConvertOptions(
        format=format_,
        mapping=mapping,
        roles=_roles(role or []),
        assistant=assistant,
        tree=tree,
        preference=preference,
        join=join,
        selection=Selection(
            cleaning=Cleaning(dedup=dedup, min_turns=min_turns, exclude=tuple(exclude or ())),
            against=tuple(against or ()),
            sample=sample,
            seed=seed,
            split=split,
            splits=splits,
        ),
        workers=workers,
        processes=True,
    )
    with TerminalReporter() as reporter:
        report = convert(sources, output, options, overwrite=overwrite, reporter=reporter)
    show(reports.convert_report(report), as_json=as_json)


def _roles(pairs: list[str]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for pair in pairs:
        name, separator, role = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"--role {pair}: expected NAME=ROLE, as in bot=assistant")
        if roles.get(name, role) != role:
            raise UsageError(f"--role {pair}: {name} was given as {roles[name]} before; expected one role per name")
        roles[name] = role
    return roles
