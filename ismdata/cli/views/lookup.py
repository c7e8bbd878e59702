"""Look up conversations in converted and packed folders, and refused records in their quarantine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ismdata import conversation
from ismdata.cli.views import row as row_view
from ismdata.data import (
    PACKED_SPLIT_FORMAT,
    QUARANTINE_NAME,
    SPLIT_FORMAT,
    ConvertedFolder,
    PackedShards,
    load_index,
    part_names,
)
from ismdata.display import View, heading, one_line, printable, title
from ismdata.errors import DataError, UsageError

#: Conversations, and examples of a reason, that are drawn; of further ones only the number is shown.
_DRAWN, _EXAMPLES = 5, 3
#: Characters of a refused record that are drawn.
_RECORD = 400
_STYLES = {"system": "magenta", "user": "blue", "assistant": "green", "tool": "cyan"}

#: Returns the function that turns the token ids of a packed folder into text.
Decoder = Callable[[Path], Callable[[list[int]], str]]


def folders_of(folder: Path) -> list[Path]:
    """The folder itself, or the splits in it. Raises DataError if its index cannot be read."""
    if load_index(folder).get("format") in (SPLIT_FORMAT, PACKED_SPLIT_FORMAT):
        return [folder / name for name in part_names(folder)]
    return [folder]


def is_packed(folder: Path) -> bool:
    """Whether a folder, or the first split in it, is packed."""
    return bool(load_index(folders_of(folder)[0]).get("format") != conversation.FORMAT)


# ---- converted folders ----


def conversation_row(folder: Path, number: int) -> View:
    """Draw the conversation of a row, counted from 0.

    Raises:
        UsageError: If there is no such row.
        DataError: If the folder is not a converted one.
    """
    converted = ConvertedFolder(folder)
    if not 0 <= number < converted.rows:
        raise UsageError(f"--row {number}: {folder} has {converted.rows} rows; expected 0 to {converted.rows - 1}")
    return _conversations(folder, [_facts(folder, number, converted.table().slice(number, 1).to_pylist()[0])], [])


def conversations_with(folder: Path, column: str, value: str) -> View:
    """Draw the conversations, and the refused records, whose `id` or `source` is a value.

    A source may be given without its folders: `train.jsonl:214` means `data/train.jsonl:214` too.

    Raises:
        UsageError: If there are none.
        DataError: If the folder is not a converted one, or its quarantine cannot be read.
    """
    found, refused = [], []
    for part in folders_of(folder):
        first = 0
        for batch in ConvertedFolder(part).batches():
            values = batch.column(column)
            matches = pc.equal(values, value)
            if column == "source":
                matches = pc.or_(matches, pc.ends_with(values, pattern=f"/{value}"))
            rows = np.flatnonzero(matches.to_numpy(zero_copy_only=False)).tolist()
            found += [_facts(part, first + at, batch.slice(at, 1).to_pylist()[0]) for at in rows]
            first += len(batch)
        refused += [line for line in _quarantine(part) if _is_meant(line, column, value)]
    if not found and not refused:
        example = next((row["source" if column == "source" else "id"] for row in _first_rows(folder)), "")
        raise UsageError(f"--{column} {value}: {folder} has none; expected one like {example}")
    return _conversations(folder, found, refused)


def _is_meant(line: dict[str, Any], column: str, value: str) -> bool:
    if column == "source":
        return line["source"] == value or str(line["source"]).endswith(f"/{value}")
    record = line["record"]
    return isinstance(record, dict) and record.get("id") == value


def _first_rows(folder: Path) -> Iterator[dict[str, Any]]:
    rows = ConvertedFolder(folders_of(folder)[0]).first(1)
    yield from [] if rows is None else rows.to_pylist()


def _facts(folder: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A conversation as a JSON object, without what is null."""
    messages = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
    rest = {k: v for k, v in row.items() if v is not None}
    return {"folder": str(folder), "row": number, **rest, "messages": messages}


def _conversations(folder: Path, found: list[dict[str, Any]], refused: list[dict[str, Any]]) -> View:
    facts = {"folder": str(folder), "conversations": found, "refused": refused}
    parts: list[RenderableType] = []
    for each in found[:_DRAWN]:
        parts += _draw_conversation(each)
    for line in refused[:_DRAWN]:
        parts += [
            Rule(Text(f"refused: {line['reason']}", "bold yellow"), align="left", style="dim"),
            *_draw_refused(line),
        ]
    more = len(found) + len(refused) - min(len(found), _DRAWN) - min(len(refused), _DRAWN)
    if more:
        parts.append(Text(f"… and {more:,} more; --json has all", "dim"))
    return View(facts=facts, drawing=Group(*parts))


def _draw_conversation(facts: dict[str, Any]) -> Iterator[RenderableType]:
    where = f"row {facts['row']:,} of {facts['folder']} · {facts['source']}"
    yield title(one_line(facts["id"]), one_line(where))
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, width=10, justify="right")
    table.add_column(overflow="fold", ratio=1)
    for name in ("meta", "tools"):
        if name in facts:
            table.add_row(Text(name, "dim"), Text(printable(facts[name]), "dim"))
    for message in facts["messages"]:
        role = message["role"]
        style = _STYLES.get(role, "red")
        mark = " "
        if role == "assistant":
            mark = "○" if message.get("train") is False or message.get("weight") == 0 else "●"
        text = Text()
        for name in ("reasoning_content", "name", "weight", "tool_call_id"):
            if name in message:
                text.append(f"{name}: {printable(str(message[name]))}\n", "dim")
        if "content" in message:
            text.append(printable(message["content"]), style)
        if "tool_calls" in message:
            text.append(
                f"{chr(10) if 'content' in message else ''}tool_calls: {printable(message['tool_calls'])}", "dim"
            )
        table.add_row(Text.assemble((role, f"bold {style}"), (mark, style)), text)
    yield table
    yield Text("  ● trained   ○ not trained", "dim")


# ---- the quarantine ----


def quarantine_examples(folder: Path, reason: str) -> View:
    """Draw refused records by reason, a few of each; all lines of one reason in the facts.

    Args:
        folder: A converted or packed folder, or one of splits.
        reason: A reason, or "all".

    Raises:
        UsageError: If nothing was refused for this reason.
        DataError: If the folder or its quarantine cannot be read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line in itertools.chain.from_iterable(map(_quarantine, folders_of(folder))):
        found.setdefault(str(line["reason"]), []).append(line)
    if reason != "all" and reason not in found:
        reasons = ", ".join(found) or "nothing was refused"
        raise UsageError(f"--quarantine {reason}: {folder} has no such record; expected all, or one of: {reasons}")
    chosen = {name: lines for name, lines in found.items() if reason in ("all", name)}
    parts: list[RenderableType] = [] if chosen else [Text("nothing was refused")]
    for name, lines in sorted(chosen.items(), key=lambda item: -len(item[1])):
        parts.append(heading(f"{name}  {len(lines):,}", conversation.REASONS.get(name, "")))
        for line in lines[: _EXAMPLES if reason == "all" else 4 * _EXAMPLES]:
            parts += _draw_refused(line)
    return View(facts={"folder": str(folder), "quarantine": chosen}, drawing=Group(*parts))


def _quarantine(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's quarantine. Raises DataError."""
    path = folder / QUARANTINE_NAME
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                refused = json.loads(line)
                yield {name: refused[name] for name in ("source", "reason", "detail", "record")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a readable quarantine ({error}). `ismdata verify {folder}` says more") from error


def _draw_refused(line: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text(f"  {one_line(str(line['source']))}: {one_line(str(line['detail']))}")
    if line["record"] is not None:
        record = json.dumps(line["record"], ensure_ascii=False)
        cut = record if len(record) <= _RECORD else f"{record[:_RECORD]}…"
        yield Text(f"    {one_line(cut)}", "dim")


# ---- packed folders ----


def packed_documents(folder: Path, name: str, decode: Decoder, *, tokens: bool) -> View:
    """Draw the documents of a conversation: those with its id, with or without `#k`.

    Args:
        folder: A packed folder, or one of packed splits.
        name: The id of the conversation.
        decode: Returns the function that turns ids into text; called once the conversation is found.
        tokens: Whether to show the ids of tokens.

    Raises:
        UsageError: If there is none.
        DataError: If a folder is not a packed one.
    """
    documents = []
    for part in folders_of(folder):
        packed = PackedShards(part)
        for number in _rows_with(packed, name):
            facts = row_view.facts(packed, number, decode(part), tokens=tokens)
            documents += [
                {"folder": str(part), "row": number, **document}
                for document in facts["documents"]
                if _names(document["conversation_id"], name)
            ]
    if not documents:
        raise UsageError(
            f"--id {name}: {folder} has no document of it; expected the id of a packed conversation. "
            f"`ismdata inspect {folder} --quarantine all` shows what was not packed"
        )
    parts: list[RenderableType] = []
    for document in documents[:_DRAWN]:
        length = document["end"] - document["start"]
        where = f"row {document['row']:,} of {document['folder']} · {length:,} tokens from {document['start']:,}"
        parts += [title(one_line(document["conversation_id"]), one_line(where)), row_view.draw_spans(document["spans"])]
    if len(documents) > _DRAWN:
        parts.append(Text(f"… and {len(documents) - _DRAWN:,} more; --json has all", "dim"))
    return View(facts={"folder": str(folder), "documents": documents}, drawing=Group(*parts))


def _names(found: str, name: str) -> bool:
    """Whether an id in a packed folder is that of a conversation, or of a piece of it."""
    return found == name or (found.startswith(f"{name}#") and found[len(name) + 1 :].isdecimal())


def _rows_with(packed: PackedShards, name: str) -> Iterator[int]:
    """The numbers of the rows with documents of a conversation."""
    first = 0
    for shard in range(len(packed.files)):
        table = packed.table(shard)
        for ids in table["conversation_ids"].chunks:
            flat = ids.flatten()
            found = pc.starts_with(flat, pattern=name).to_numpy(zero_copy_only=False)
            rows = np.repeat(np.arange(len(ids)), pc.list_value_length(ids).to_numpy())
            for at in dict.fromkeys(rows[found].tolist()):
                if any(_names(one, name) for one in _row_ids(ids, at)):
                    yield first + at
            first += len(ids)


def _row_ids(ids: pa.ListArray, row: int) -> list[str]:
    found: list[str] = ids[row].as_py()
    return found
