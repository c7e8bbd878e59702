"""Rows to records: a conversation that stands in several rows of its source becomes one record, the list of its rows.

A row that cannot be read, or whose place among the others cannot be told, stays a record of its own and is refused with
its own reason: nothing vanishes. A record never takes rows of two places, that is, of two files or of two splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.convert.corpus_format import Block, Place
from ismdata.convert.sources.blocks import TableBlock
from ismdata.errors import Refused

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?")
#: Rows in a block of groups, roughly: enough to share the work out, few enough to keep the results small.
_BLOCK_ROWS = 4096


@dataclass(kw_only=True)
class Group:
    """The rows of one record as (block, row) pairs; `refusal` is set where they are no record, and says why."""

    rows: list[tuple[Block, int]]
    refusal: Refused | None = None

    @property
    def number(self) -> int:
        block, row = self.rows[0]
        return int(block.numbers[row])


@dataclass(frozen=True, kw_only=True)
class GroupBlock:
    """N records, each a list of rows; their values are read when they are asked for."""

    groups: Sequence[Group]

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        return np.array([group.number for group in self.groups], np.int64)

    def record(self, row: int) -> Any:
        group = self.groups[row]
        if group.refusal is not None:
            raise group.refusal
        return [block.record(at) for block, at in group.rows]

    def raw(self, row: int) -> Any:
        group = self.groups[row]
        values = [block.raw(at) for block, at in group.rows]
        return values[0] if group.refusal is not None and len(values) == 1 else values

    def table(self, schema: pa.Schema, *, wrapped: bool = False) -> pa.Table | None:
        return None

    def texts(self) -> pa.Array | None:
        return None


def by_start(
    blocks: Iterable[tuple[Block, Place]], starts: Callable[[Any], bool]
) -> Iterator[tuple[GroupBlock, Place]]:
    """Records that begin with each row for which `starts(row)` holds; `starts` may raise Refused.

    Rows before the first such row are a record too. Streams: held are the rows since the last start.
    """
    waiting: list[Group] = []
    open_at: int | None = None  # where in `waiting` the record is that further rows go to
    last: Place | None = None
    for block, place in blocks:
        if last is not None and place != last:
            yield from _cut(waiting, last)
            waiting, open_at = [], None
        last = place
        for row in range(len(block.numbers)):
            try:
                starting = starts(block.record(row))
            except Refused as refusal:
                waiting.append(Group(rows=[(block, row)], refusal=refusal))
                continue
            if starting or open_at is None:
                open_at = len(waiting)
                waiting.append(Group(rows=[(block, row)]))
            else:
                waiting[open_at].rows.append((block, row))
        done = len(waiting) if open_at is None else open_at
        yield from _cut(waiting[:done], place)
        waiting, open_at = waiting[done:], None if open_at is None else 0
    if last is not None:
        yield from _cut(waiting, last)


def by_key(
    blocks: Iterable[tuple[Block, Place]], key: Callable[[Any], Hashable], *, columns: Collection[str] | None = None
) -> Iterator[tuple[GroupBlock, Place]]:
    """Records of the rows with the same `key(row)`, in the order of their first rows; `key` may raise Refused.

    `columns` names the fields that `key` looks at, None for all.

    The rows of a record may lie far apart, so the blocks of a whole place are held, as bytes or as Arrow tables, and
    about 200 bytes for each row beside them.
    """
    found: dict[Hashable, Group] = {}
    waiting: list[Group] = []
    last: Place | None = None
    for block, place in blocks:
        if last is not None and place != last:
            yield from _cut(waiting, last)
            found, waiting = {}, []
        last = place
        looked_at = narrowed(block, columns)
        for row in range(len(block.numbers)):
            try:
                name = key(looked_at.record(row))
            except Refused as refusal:
                waiting.append(Group(rows=[(block, row)], refusal=refusal))
                continue
            if name in found:
                found[name].rows.append((block, row))
            else:
                found[name] = Group(rows=[(block, row)])
                waiting.append(found[name])
    if last is not None:
        yield from _cut(waiting, last)


def narrowed(block: Block, columns: Collection[str] | None) -> Block:
    """The block with at least the named columns: with no others, where rows cost by the column."""
    if columns is None or not isinstance(block, TableBlock):
        return block
    present = [name for name in block.rows.column_names if name in columns]
    return TableBlock(rows=block.rows.select(present), numbers=block.numbers)


def _cut(groups: Sequence[Group], place: Place) -> Iterator[tuple[GroupBlock, Place]]:
    """Blocks of about `_BLOCK_ROWS` rows."""
    first = rows = 0
    for at, group in enumerate(groups, 1):
        rows += len(group.rows)
        if rows >= _BLOCK_ROWS or at == len(groups):
            yield GroupBlock(groups=groups[first:at]), place
            first, rows = at, 0


def number_of(value: Any) -> int | float | None:
    """A number, or one as tables of text hold it; None for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value) if "." in value else int(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def in_order(rows: Sequence[dict[str, Any]], column: str | None) -> list[dict[str, Any]]:
    """Rows by the numbers in `column`; as they stand where it is None or holds anything but numbers.

    >>> in_order([{"turn": "10"}, {"turn": "9"}], "turn")
    [{'turn': '9'}, {'turn': '10'}]
    """
    numbers = [None if column is None else number_of(row.get(column)) for row in rows]
    if any(number is None for number in numbers):
        return list(rows)
    return [rows[at] for at in sorted(range(len(rows)), key=lambda at: numbers[at] or 0)]
