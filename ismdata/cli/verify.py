"""`ismdata verify`: check a folder against its index and against every invariant."""

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
