"""Groups rows into records: a conversation that occupies several rows of its source becomes one list of rows.

A row that cannot be read, or that does not say which record it belongs to, stays a record of its own and is refused
with its own reason, so that nothing disappears. A record never spans two files or two splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.convert.corpus_format import Block, Place
from ismdata.convert.sources.blocks import TableBlock, Unreadable, ValueBlock
from ismdata.errors import Refused

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?")
#: Approximate number of rows in a block of groups: enough to share the work, few enough to keep the results small.
_BLOCK_ROWS = 4096


@dataclass(kw_only=True)
class Group:
    """The rows of one record as (block, row) pairs. `refusal` says why they are no record, if so."""

    rows: list[tuple[Block, int]]
    refusal: Refused | None = None

    @property
    def number(self) -> int:
        block, row = self.rows[0]
        return int(block.numbers[row])


@dataclass(frozen=True, kw_only=True)
class GroupBlock:
    """N records, each a list of rows, whose values are read on access."""

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


def group_by_start(
    blocks: Iterable[tuple[Block, Place]], starts: Callable[[Any], bool]
) -> Iterator[tuple[GroupBlock, Place]]:
    """Records that begin at each row for which `starts(row)` is true. `starts` may raise Refused.

    Rows before the first such row form a record too. Streams: only the rows since the last start are kept in memory.
    """
    for place, run in groupby(blocks, key=itemgetter(1)):
        waiting: list[Group] = []
        open_at: int | None = None  # index in `waiting` of the record that further rows belong to
        for block, _ in run:
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
            yield from _group_blocks(waiting[:done], place)
            waiting, open_at = waiting[done:], None if open_at is None else 0
        yield from _group_blocks(waiting, place)


def group_by_key(
    blocks: Iterable[tuple[Block, Place]], key: Callable[[Any], Hashable], *, columns: Collection[str] | None = None
) -> Iterator[tuple[GroupBlock, Place]]:
    """Records of the rows with equal `key(row)`, in the order of their first rows. `key` may raise Refused.

    `columns` names the fields that `key` reads, None for all.

    The rows of a record may be far apart, so the blocks of a whole file or split are kept in memory, as bytes or Arrow
    tables, with about 200 bytes per row beside them.
    """
    for place, run in groupby(blocks, key=itemgetter(1)):
        found: dict[Hashable, Group] = {}
        waiting: list[Group] = []
        for block, _ in run:
            narrow = block if columns is None else select_columns(block, columns)
            for row in range(len(block.numbers)):
                try:
                    name = key(narrow.record(row))
                except Refused as refusal:
                    waiting.append(Group(rows=[(block, row)], refusal=refusal))
                    continue
                if name in found:
                    found[name].rows.append((block, row))
                else:
                    found[name] = Group(rows=[(block, row)])
                    waiting.append(found[name])
        yield from _group_blocks(waiting, place)


def expand_records(
    blocks: Iterable[tuple[Block, Place]], inner: Callable[[Any], Sequence[Any] | None]
) -> Iterator[tuple[Block, Place]]:
    """The records inside records: `inner(record)` lists them. A record that has none stays a record itself.

    Each inner record is named after the place of the outer one and its number in it.
    """
    for block, place in blocks:
        found = [_inner(block, row, inner) for row in range(len(block.numbers))]
        if not any(isinstance(values, list) and values for values in found):
            yield block, place
            continue
        for row, values in enumerate(found):
            number = int(block.numbers[row])
            if isinstance(values, list) and values:
                inside = Place(prefix=f"{place.prefix}{number}:record ", stem=f"{place.stem}-{number}")
                yield ValueBlock(values=values, numbers=np.arange(1, len(values) + 1)), inside
            else:
                alone = values if isinstance(values, Unreadable) else block.record(row)
                yield ValueBlock(values=[alone], numbers=np.array([number])), place


def _inner(block: Block, row: int, inner: Callable[[Any], Sequence[Any] | None]) -> list[Any] | Unreadable:
    """The records inside a record, or the record if it cannot be read."""
    try:
        return list(inner(block.record(row)) or ())
    except Refused as refusal:
        return Unreadable(refusal=refusal, raw=block.raw(row))


def select_columns(block: Block, columns: Collection[str]) -> Block:
    """The block with at least these columns: without the others if it is a table, which is read column by column."""
    if not isinstance(block, TableBlock):
        return block
    present = [name for name in block.rows.column_names if name in columns]
    return TableBlock(rows=block.rows.select(present), numbers=block.numbers)


def _group_blocks(groups: Sequence[Group], place: Place) -> Iterator[tuple[GroupBlock, Place]]:
    """Blocks of about `_BLOCK_ROWS` rows."""
    first = rows = 0
    for at, group in enumerate(groups, 1):
        rows += len(group.rows)
        if rows >= _BLOCK_ROWS or at == len(groups):
            yield GroupBlock(groups=groups[first:at]), place
            first, rows = at, 0


def parse_number(value: Any) -> int | float | None:
    """A number, also one given as text, as CSV files have it; None for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value) if "." in value else int(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def sort_rows(rows: Sequence[dict[str, Any]], column: str | None) -> list[dict[str, Any]]:
    """Rows sorted by the numbers in `column`; in their own order if it is None or has values that are no numbers.

    >>> sort_rows([{"turn": "10"}, {"turn": "9"}], "turn")
    [{'turn': '9'}, {'turn': '10'}]
    """
    numbers = [None if column is None else parse_number(row.get(column)) for row in rows]
    if any(number is None for number in numbers):
        return list(rows)
    return [rows[at] for at in sorted(range(len(rows)), key=lambda at: numbers[at] or 0)]
