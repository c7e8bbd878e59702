"""Draw one packed row: its text by spans, its targets, and its mask in half-block characters.

Each kind of span has a name and a colour. Targets are underlined. A full dot beside an answer's name says that it is
trained, an empty dot that it is not, so that nothing is lost where there are no colours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ismdata.data import PackedSequence, PackedShards
from ismdata.display import printable
from ismdata.masks import START, intervals

KINDS = ("prompt", "query", "answer")
_STYLES = {"prompt": "magenta", "query": "blue", "answer": "green"}

#: The mask is drawn with at most this many cells per side.
_CELLS = 64
_BEHIND, _AHEAD = "cyan", "yellow"


def facts(
    packed: PackedShards, number: int, decode: Callable[[list[int]], str], *, tokens: bool = False
) -> dict[str, Any]:
    """Describe a row as a JSON object: its documents, their spans as text, and which parts of these are targets.

    Args:
        packed: The packed folder.
        number: The row's number.
        decode: Turns token ids into text.
        tokens: Whether the parts of spans have `tokens` too: the id and the text of each.

    Returns:
        `row`, `rows`, `seq_len`, `mask`, `layout`, `target_tokens`, `padding_tokens` and `documents`.
    """
    sequence = packed[number]
    documents = []
    ends = np.cumsum(sequence.seq_lens).tolist()
    for name, length, end in zip(sequence.conversation_ids, sequence.seq_lens.tolist(), ends, strict=True):
        inside = (sequence.spans[:, START] >= end - length) & (sequence.spans[:, START] < end)
        spans = [_span(sequence, span, decode, tokens) for span in sequence.spans[inside].tolist()]
        documents.append({"conversation_id": name, "start": end - length, "end": end, "spans": spans})
    return {
        "row": number,
        "rows": len(packed),
        "seq_len": packed.seq_len,
        "mask": packed.mask,
        "layout": packed.layout,
        "target_tokens": int(np.count_nonzero(sequence.loss_mask)),
        "padding_tokens": packed.seq_len - int(sequence.seq_lens.sum()),
        "documents": documents,
    }


def _span(
    sequence: PackedSequence, span: list[int], decode: Callable[[list[int]], str], tokens: bool
) -> dict[str, Any]:
    start, end, kind, train = span
    target = sequence.loss_mask[start:end] != 0
    borders = [0, *(np.flatnonzero(np.diff(target)) + 1).tolist(), end - start]
    runs = [
        {"target": bool(target[low]), "text": decode(sequence.input_ids[start + low : start + high].tolist())}
        for low, high in itertools.pairwise(borders)
    ]
    if tokens:
        for run, (low, high) in zip(runs, itertools.pairwise(borders), strict=True):
            run["tokens"] = [
                [token, decode([token])] for token in sequence.input_ids[start + low : start + high].tolist()
            ]
    facts = {"kind": KINDS[kind], "start": start, "end": end, "train": bool(train), "runs": runs}
    if sequence.position_ids_2 is not None:  # the ends are enough: within a span a position is constant or counts up
        for name, positions in (("position_1", sequence.position_ids), ("position_2", sequence.position_ids_2)):
            facts[name] = [int(positions[start]), int(positions[end - 1])]
    return facts


@dataclass(frozen=True, kw_only=True)
class RowDrawing:
    """Draws the facts about a row, and its mask, on a rich console."""

    facts: dict[str, Any]
    sequence: PackedSequence
    mask: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = self.facts
        documents = facts["documents"]
        head = (
            f"{len(documents)} document{'' if len(documents) == 1 else 's'} · {facts['seq_len']:,} tokens · "
            f"{facts['target_tokens']:,} targets · {facts['padding_tokens']:,} padding"
        )
        yield Text.assemble((f"row {facts['row']:,} of {facts['rows']:,}", "bold"), "  ", (head, "dim"))
        for number, document in enumerate(documents, 1):
            length = document["end"] - document["start"]
            title = f"document {number} · {printable(document['conversation_id'])} · {length:,} tokens"
            yield Rule(Text(title, "bold"), align="left", style="dim", characters="─")
            yield draw_spans(document["spans"])
        if facts["padding_tokens"]:
            yield Rule(Text(f"padding · {facts['padding_tokens']:,} tokens", "dim"), align="left", style="dim")
        yield Rule(Text(f"mask {self.mask}", "bold"), align="left", style="dim")
        yield from self._mask(colours=console.is_terminal and console.color_system is not None)
        if facts["layout"] == "glm":
            yield Text(
                "  before each span in brackets: position 1 | position 2, from its first token to its last", "dim"
            )
        yield _legend()

    def _mask(self, *, colours: bool) -> Iterator[Text]:
        seq_len = self.facts["seq_len"]
        seen, ahead = mask_cells(self.sequence, mask=self.mask, seq_len=seq_len)
        side = len(seen)
        yield Text(f"  row: a token, column: a token that it sees; {seq_len / side:,.0f} tokens per cell", "dim")
        yield Text(f"  ┌{'─' * side}┐", "dim")
        for upper in range(0, side, 2):
            line = Text.assemble(("  │", "dim"))
            for column in range(side):
                cells = [
                    (_AHEAD if ahead[row, column] else _BEHIND) if row < side and seen[row, column] else None
                    for row in (upper, upper + 1)
                ]
                line.append(*_half_block(cells[0], cells[1], colours=colours))
            yield line.append("│", "dim")
        yield Text(f"  └{'─' * side}┘", "dim")
        yield (
            Text.assemble("  ", ("█", _BEHIND), " sees itself and before   ", ("█", _AHEAD), " sees ahead")
            if colours
            else Text("  █ sees   (blank) does not see")
        )


def _half_block(upper: str | None, lower: str | None, *, colours: bool) -> tuple[str, Style]:
    """The character and style for two cells, one above the other; each is a colour or None."""
    if upper and lower:
        return ("▀", Style(color=upper, bgcolor=lower)) if colours and upper != lower else ("█", Style(color=upper))
    if upper:
        return "▀", Style(color=upper)
    return ("▄", Style(color=lower)) if lower else (" ", Style())


def mask_cells(sequence: PackedSequence, *, mask: str, seq_len: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Reduce a row's mask to at most 64 x 64 cells.

    Args:
        sequence: The row.
        mask: `ism`, `causal` or `prefix`.
        seq_len: Tokens per sequence.

    Returns:
        Two arrays bool[N, N], N = min(64, seq_len). The first is true where at least half of a cell is visible, the
        second where besides at least half of the visible part lies ahead of the token that sees it.
    """
    doc_start, kv_end = intervals(sequence.seq_lens, sequence.spans, seq_len=seq_len, mask=mask)
    side = min(_CELLS, seq_len)
    edges = np.arange(side + 1) * seq_len // side
    token = np.arange(seq_len)

    def share(low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.float64]:
        """The part of each cell, [N, N], that lies in the intervals [low, high) of its rows."""
        inside = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
        areas = np.add.reduceat(np.maximum(inside, 0), edges[:-1], axis=0)
        part: NDArray[np.float64] = areas / (np.diff(edges)[:, None] * np.diff(edges))
        return part

    everything, beyond = share(doc_start, kv_end), share(token + 1, kv_end)
    seen = everything >= 0.5
    return seen, seen & (beyond * 2 >= everything)


def draw_spans(spans: list[dict[str, Any]]) -> Table:
    """Draw spans below each other. Each has a `kind` and `runs`: parts of its `text` that are a `target` or not."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, width=8, justify="right")
    table.add_column(overflow="fold", ratio=1)
    for span in spans:
        style = _STYLES[span["kind"]]
        dot = " " if span["kind"] != "answer" else "●" if any(run["target"] for run in span["runs"]) else "○"
        text = Text()
        if "position_1" in span:
            text.append(f"({_range(span['position_1'])} | {_range(span['position_2'])}) ", "dim")
        for run in span["runs"]:
            if "tokens" in run:
                for token, part in run["tokens"]:
                    text.append(printable(part), Style(color=style, underline=run["target"]))
                    text.append(f"‹{token}›", "dim")
                continue
            text.append(printable(run["text"]), Style(color=style, underline=run["target"]))
        table.add_row(Text.assemble((span["kind"], f"bold {style}"), (dot, style)), _border_breaks(text))
    return table


def _range(ends: list[int]) -> str:
    return f"{ends[0]}" if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _border_breaks(text: Text) -> Text:
    """Show a line break at the start or end of a text as a sign; it would be drawn as an empty line."""
    if text.plain.startswith("\n"):
        text = Text.assemble(("⏎", "dim"), text[1:])
    if text.plain.endswith("\n"):
        text = Text.assemble(text[:-1], ("⏎", "dim"))
    return text


def _legend() -> Text:
    return Text.assemble(
        "  ",
        ("prompt", _STYLES["prompt"]),
        "  ",
        ("query", _STYLES["query"]),
        "  ",
        ("answer", _STYLES["answer"]),
        "   ",
        ("●", _STYLES["answer"]),
        " trained (",
        ("targets", "underline"),
        ")   ",
        ("○", _STYLES["answer"]),
        " not trained   ⏎ line break at a span's border",
    )
