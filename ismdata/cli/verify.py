"""`ismdata verify`: check a folder against its index and against all invariants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.common import AsJson, show
from ismdata.display import TerminalReporter


def verify_command(
    folder: Annotated[Path, typer.Argument(help="A converted or packed folder.")],
    conversations: Annotated[
        list[Path] | None,
        typer.Option(
            help="A converted folder that the packed folder was made from. Every row is decoded, and every text of the "
            "conversations must be in its place. Repeatable."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a folder: its files against its index, and all invariants on all rows.

    With --conversations, also check that no text was lost and that only answers are trained. Exit code 1 if a check
    fails.
    """
    from ismdata.cli.views import reports
    from ismdata.data import verify
    from ismdata.pack import verify_conversations

    report = verify(folder)
    if conversations and report.ok:
        with TerminalReporter() as reporter:
            report = verify_conversations(report, conversations, reporter=reporter)
    show(reports.verify_report(report), as_json=as_json)
    if not report.ok:
        raise typer.Exit(1)
