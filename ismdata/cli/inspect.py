"""`ismdata inspect`: summarize a folder, or draw one packed row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.common import AsJson, show


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="A converted or packed folder.")],
    row: Annotated[int | None, typer.Option(help="Draw this row: its text by spans, its targets, its mask.")] = None,
    as_json: AsJson = False,
) -> None:
    """Summarize a folder: counts, lengths, fill and quarantine. With --row, draw one packed row."""
    from ismdata.cli.views import folders as view

    if row is None:
        show(view.folder_summary(folder), as_json=as_json)
    else:
        from ismdata.rendering import ConversationEncoder

        show(
            view.row(folder, row, decode=lambda: ConversationEncoder.load(folder / "tokenizer").decode), as_json=as_json
        )
