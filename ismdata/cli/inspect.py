"""`ismdata inspect`: summarize a folder, or draw conversations, refused records or a packed row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.common import AsJson, show
from ismdata.errors import UsageError


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="A converted or packed folder, or a folder of splits.")],
    row: Annotated[
        int | None, typer.Option(help="Draw this conversation, or this packed row: its spans, targets and mask.")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Draw the conversation with this id.")] = None,
    source: Annotated[
        str | None, typer.Option(metavar="FILE:PLACE", help="Draw what was read there, e.g. train.jsonl:214.")
    ] = None,
    quarantine: Annotated[
        str | None, typer.Option(metavar="all|REASON", help="Show refused records by reason, with examples.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show the id of each token of a packed folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Summarize a folder: counts, lengths, fill and quarantine; or draw one row, conversation or place.

    Colours in a pager: FORCE_COLOR=1 ismdata inspect FOLDER --row 0 | less -R
    """
    asked = [name for name, value in (("--row", row), ("--id", id_), ("--source", source)) if value is not None]
    asked += ["--quarantine"] if quarantine is not None else []
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} exclude each other; expected one of them")

    from ismdata.cli.views import folders as view

    if not asked:
        if tokens:
            raise UsageError("--tokens shows a packed row; expected --row or --id with it")
        show(view.folder_summary(folder), as_json=as_json)
        return

    from ismdata.cli.views import lookup

    view.check_folder(folder)
    if quarantine is not None:
        show(lookup.quarantine_examples(folder, quarantine), as_json=as_json)
        return
    packed = lookup.is_packed(folder)
    if packed and source is not None:
        raise UsageError(f"--source {source}: {folder} is packed; expected --id, or the converted folder")
    if tokens and not packed:
        raise UsageError(f"--tokens: {folder} is a converted folder, without tokens; expected a packed one")
    if source is not None:
        found = lookup.conversations_with(folder, "source", source)
    elif id_ is not None and packed:
        found = lookup.packed_documents(folder, id_, _decoder, tokens=tokens)
    elif id_ is not None:
        found = lookup.conversations_with(folder, "id", id_)
    elif packed:
        found = view.row(folder, row or 0, decode=lambda: _decoder(folder), tokens=tokens)
    else:
        found = lookup.conversation_row(folder, row or 0)
    show(found, as_json=as_json)


def _decoder(folder: Path) -> Callable[[list[int]], str]:
    """The function that turns the token ids of a packed folder into text."""
    from ismdata.rendering import ConversationEncoder

    return ConversationEncoder.load(folder / "tokenizer").decode
