"""Summarize a converted or packed folder for `ismdata inspect`: facts as JSON, and a drawing of them.

One row is described and drawn in `row.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

from ismdata import conversation
from ismdata.cli.views import row as row_view
from ismdata.cli.views.parts import parts_table
from ismdata.cli.views.quarantine import quarantine
from ismdata.data import (
    INDEX_NAME,
    PACKED_SPLIT_FORMAT,
    SPLIT_FORMAT,
    ConvertedFolder,
    load_index,
    next_step,
    part_names,
    shards,
)
from ismdata.display import View, histogram_bars, numbers, share_bar, title
from ismdata.errors import DataError, UsageError
from ismdata.masks import ANSWER

#: Histograms have one bar per value up to this maximum, and one per doubling beyond it.
_SINGLE_BARS = 12


# ---- folders ----


def check_folder(folder: Path) -> None:
    """Raise DataError if a folder has no index."""
    path = folder / INDEX_NAME
    if not path.is_file():
        what = f"no {INDEX_NAME}" if folder.is_dir() else "a file" if folder.exists() else "nothing"
        raise DataError(
            f"{folder}: found {what}; expected a folder that `ismdata convert` or `ismdata pack` wrote."
            f"{next_step(folder, packed=False)}"
        )


def summary(folder: Path) -> dict[str, Any]:
    """Describe a converted or packed folder, or one of splits, as a JSON object.

    Raises:
        DataError: If the folder is none of these.
    """
    check_folder(folder)
    format_ = load_index(folder).get("format")
    if format_ in (SPLIT_FORMAT, PACKED_SPLIT_FORMAT):
        parts = {name: summary(folder / name) for name in part_names(folder)}
        return {"folder": str(folder), "format": format_, "parts": parts}
    return _converted_summary(folder) if format_ == conversation.FORMAT else _packed_summary(folder)


def folder_summary(folder: Path) -> View:
    """Summarize a folder.

    Raises:
        DataError: If it is neither a converted nor a packed folder.
    """
    facts = summary(folder)
    if "parts" in facts:
        what = "splits of conversations" if facts["format"] == SPLIT_FORMAT else "packed splits"
        drawings = [_draw(part) for part in facts["parts"].values()]
        head = title(facts["folder"], what)
        separated = [each for drawing in drawings for each in (Text(), drawing)]
        return View(facts=facts, drawing=Group(head, *parts_table(facts["parts"]), *separated))
    return View(facts=facts, drawing=_draw(facts))


def _draw(facts: dict[str, Any]) -> RenderableType:
    return _draw_converted(facts) if facts["format"] == conversation.FORMAT else _draw_packed(facts)


def row(folder: Path, number: int, *, decode: Callable[[], Callable[[list[int]], str]], tokens: bool = False) -> View:
    """Draw one packed row: its text by spans, its targets, its mask.

    Args:
        folder: A packed folder.
        number: The row, counted from 0.
        decode: Returns the function that turns ids into text; called once the row is known to exist.
        tokens: Whether to show the ids of tokens.

    Raises:
        UsageError: If there is no such row.
        DataError: If the folder is not a packed one.
    """
    packed = shards.PackedShards(folder)
    if not 0 <= number < len(packed):
        raise UsageError(f"--row {number}: {folder} has {len(packed)} rows; expected 0 to {len(packed) - 1}")
    facts = row_view.facts(packed, number, decode(), tokens=tokens)
    return View(facts=facts, drawing=row_view.RowDrawing(facts=facts, sequence=packed[number], mask=packed.mask))


def histogram(values: NDArray[np.integer[Any]]) -> list[dict[str, int]]:
    """Count positive integers in bars with `from`, `to` (inclusive) and `count`: one bar per value or per doubling."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    if high <= _SINGLE_BARS:
        edges = list(range(low, high + 2))
    else:
        edges = [1 << power for power in range(max(low, 1).bit_length() - 1, high.bit_length() + 1)]
        edges[0] = min(edges[0], low)
    counts, _ = np.histogram(values, bins=edges)
    return [
        {"from": start, "to": stop - 1, "count": count}
        for (start, stop), count in zip(itertools.pairwise(edges), counts.tolist(), strict=True)
    ]


def _packed_summary(folder: Path) -> dict[str, Any]:
    packed = shards.PackedShards(folder)
    index, totals = packed.index, packed.index["totals"]
    lengths, answers = [], []
    for number in range(len(packed.files)):
        table = packed.table(number)
        for seq_lens, spans in zip(table["seq_lens"].chunks, table["spans"].chunks, strict=True):
            lengths.append(seq_lens.flatten().to_numpy())
            answers.append(_answers_per_document(seq_lens, spans, packed.seq_len, layout=packed.layout))
    capacity = totals["sequences"] * packed.seq_len
    return {
        "folder": str(folder),
        "format": index["format"],
        "mask": packed.mask,
        "layout": packed.layout,
        "seq_len": packed.seq_len,
        "tokenizer": index["tokenizer"].get("name"),
        **totals,
        "fill": totals["tokens"] / capacity if capacity else 0.0,
        "target_share": totals["target_tokens"] / totals["tokens"] if totals["tokens"] else 0.0,
        "lengths": histogram(_concatenate(lengths)),
        "answers": histogram(_concatenate(answers)),
        "read": index["counts"]["read"],
        "quarantined": index["counts"]["quarantined"],
        "first_refusals": _first_refusals(folder, index),
    }


def _answers_per_document(
    seq_lens: pa.ListArray, spans: pa.ListArray, seq_len: int, *, layout: str
) -> NDArray[np.int64]:
    """Count the answers of each document of some rows, int64[D]."""
    documents = pc.list_value_length(seq_lens).to_numpy().astype(np.int64)
    lengths = seq_lens.flatten().to_numpy().astype(np.int64)
    before = np.cumsum(lengths) - lengths
    first = np.cumsum(documents) - documents
    row_of_document = np.repeat(np.arange(len(documents)), documents)
    start = before - before[first[row_of_document]] + row_of_document * seq_len
    flat = spans.flatten()
    row_of_span = np.repeat(np.arange(len(spans)), pc.list_value_length(spans).to_numpy())
    answer = flat.field("kind").to_numpy() == ANSWER
    if layout == "glm":  # [START] is a span of its own before each answer, so an answer is a run of spans
        answer[1:] &= ~answer[:-1]
    place = (flat.field("start").to_numpy() + row_of_span * seq_len)[answer]
    return np.bincount(np.searchsorted(start, place, side="right") - 1, minlength=len(lengths))


def _concatenate(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _converted_summary(folder: Path) -> dict[str, Any]:
    converted = ConvertedFolder(folder)
    index = converted.index
    messages, turns = [], []
    roles = dict.fromkeys(conversation.ROLES, 0)
    for batch in converted.table().to_batches():
        column = batch.column("messages")
        messages.append(pc.list_value_length(column).to_numpy())
        role = column.flatten().field("role")
        for entry in pc.value_counts(role).to_pylist():
            roles[entry["values"]] = roles.get(entry["values"], 0) + entry["counts"]
        turns.append(_turns(column, role))
    lengths = _concatenate(messages)
    return {
        "folder": str(folder),
        "format": index["format"],
        "conversations": len(lengths),
        "messages": int(lengths.sum()),
        "roles": {name: count for name, count in roles.items() if count},
        "turns": histogram(_concatenate(turns)),
        "read": index["counts"]["read"],
        "quarantined": index["counts"]["quarantined"],
        "first_refusals": _first_refusals(folder, index),
    }


def _turns(messages: pa.ListArray, role: pa.StringArray) -> NDArray[np.int64]:
    """Turns per conversation: runs of messages by one party. System prompts do not count; tools are the assistant's."""
    lengths = pc.list_value_length(messages).to_numpy()
    conversation_of = np.repeat(np.arange(len(lengths)), lengths)
    code = pc.index_in(role, value_set=pa.array(conversation.ROLES)).to_numpy(zero_copy_only=False)
    code = np.where(code == conversation.TOOL, conversation.ASSISTANT, code)
    spoken = code != conversation.SYSTEM
    code, conversation_of = code[spoken], conversation_of[spoken]
    new = np.ones(len(code), bool)
    new[1:] = (code[1:] != code[:-1]) | (conversation_of[1:] != conversation_of[:-1])
    return np.bincount(conversation_of[new], minlength=len(lengths))


def _first_refusals(folder: Path, index: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The source and detail of the first refused record for each reason."""
    first: dict[str, dict[str, str]] = {}
    wanted = {reason for reason, count in index["counts"]["quarantined"].items() if count}
    path = folder / index["quarantine"]["name"]
    if not wanted:
        return first
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                refused = json.loads(line)
                first.setdefault(refused["reason"], {"source": refused["source"], "detail": refused["detail"]})
                if first.keys() >= wanted:
                    break
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable quarantine ({error}). `ismdata verify {folder}` says more") from error
    return first


# ---- drawing folders ----


def _draw_packed(facts: dict[str, Any]) -> RenderableType:
    bound = facts["lower_bound_sequences"]
    extra = f"lower bound {bound:,} · × {facts['sequences'] / bound:.4f}" if bound else ""
    handled = [f"{facts[name]:,} {name}" for name in ("split", "truncated", "dropped") if facts[name]]
    layout = "" if facts["layout"] == "plain" else f"layout {facts['layout']} · "
    head = f"mask {facts['mask']} · {layout}{facts['seq_len']:,} tokens per sequence"
    return Group(
        title(facts["folder"], head + (f" · tokenizer {facts['tokenizer']}" if facts["tokenizer"] else "")),
        numbers(
            ("conversations", facts["conversations"], " · ".join(handled)),
            ("documents", facts["documents"], ""),
            ("sequences", facts["sequences"], extra),
            ("tokens", facts["tokens"], share_bar(facts["fill"], "of all positions filled", "cyan")),
            ("targets", facts["target_tokens"], share_bar(facts["target_share"], "of the tokens are targets", "green")),
        ),
        *histogram_bars("tokens per document", facts["lengths"]),
        *histogram_bars("answers per document", facts["answers"]),
        *quarantine(facts),
    )


def _draw_converted(facts: dict[str, Any]) -> RenderableType:
    total = max(facts["messages"], 1)
    return Group(
        title(facts["folder"], "conversations"),
        numbers(
            ("conversations", facts["conversations"], ""),
            ("messages", facts["messages"], ""),
            *((f"  {role}", count, share_bar(count / total, "", "cyan")) for role, count in facts["roles"].items()),
        ),
        *histogram_bars("turns per conversation", facts["turns"]),
        *quarantine(facts),
    )
