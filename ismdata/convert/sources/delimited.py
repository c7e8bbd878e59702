"""CSV and TSV: a header, then one record per row, a dict of strings."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ismdata.convert.sources.blocks import Unreadable, ValueBlock
from ismdata.convert.sources.framing import BLOCK_BYTES, MAX_RECORD_BYTES, ByteQueue, Framed
from ismdata.errors import DataError, Refused

if TYPE_CHECKING:
    import _csv

#: Cell separators, and the name of the layout.
DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", "|": "CSV with bars"}

#: Rows in a block; it also ends when it has as many characters as a block of JSON has bytes.
_ROWS = 4096


def frame_rows(queue: ByteQueue, *, delimiter: str) -> Iterator[Framed]:
    """The rows below the header as records, numbered by the line on which each begins. Blank lines are skipped.

    A row with more or fewer cells than the header, or with bytes that are not UTF-8, is an `Unreadable`. A broken or
    missing quote raises DataError, because the borders of the cells after it are unknown.
    """
    rows = _cells(_lines(queue), delimiter, queue.name)
    _, header = next(rows, (0, []))
    names = column_names([_shown(cell) for cell in header])
    values: list[Any] = []
    numbers: list[int] = []
    size = 0  # characters in `values`
    for number, cells in rows:
        values.append(_record(names, cells))
        numbers.append(number)
        size += sum(map(len, cells))
        if len(values) == _ROWS or size > BLOCK_BYTES:
            yield Framed(block=ValueBlock(values=values, numbers=np.array(numbers)))
            values, numbers, size = [], [], 0
    if values:
        yield Framed(block=ValueBlock(values=values, numbers=np.array(numbers)))


def column_names(header: list[str]) -> list[str]:
    """Distinct names of the columns: a column without a name gets its number, a repeated name a number in brackets.

    >>> column_names(["", "text", "text"])
    ['column 1', 'text', 'text (2)']
    """
    names: dict[str, None] = {}
    last: dict[str, int] = {}  # the last number added to each name: searching from 2 would be quadratic in the columns
    for number, cell in enumerate(header, 1):
        name = wanted = cell.strip() or f"column {number}"
        while name in names:
            last[wanted] = last.get(wanted, 1) + 1
            name = f"{wanted} ({last[wanted]})"
        names[name] = None
    return [*names]


def detect_delimiter(head: bytes, is_record: Callable[[Any], bool], *, named: bool) -> str | None:
    """The separator with which the header and one of the first rows form a record. `head` is the file's beginning.

    If none does and the file is `named` like a table, the separator with the most columns in the header, or one that
    is in none of the first rows; else None.
    """
    whole = head[: head.rfind(b"\n") + 1] or head
    most, best, single = 1, None, None
    for delimiter in DELIMITERS:
        # The head may end inside a row, and only the first rows matter here, so parsing is not strict.
        text = io.TextIOWrapper(io.BytesIO(whole), encoding="utf-8", errors="replace", newline="")
        reader = _csv_reader(text, delimiter, strict=False)
        try:
            header, *rows = [row for row in (next(reader, []) for _ in range(20)) if row] or [[]]
        except csv.Error:
            continue
        fitting = next((row for row in rows if len(row) == len(header)), None)
        row = dict(zip(column_names(header), fitting or (), strict=False))
        if len(header) > 1 and fitting is not None and is_record(row):
            return delimiter
        if len(header) > most and rows:
            most, best = len(header), delimiter
        if single is None and rows and all(len(row) == 1 for row in (header, *rows)):
            single = delimiter
    return (best or single) if named else None


def _record(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        detail = f"the row has {len(cells)} cells; expected {len(names)} as in the header: {', '.join(names[:8])}"
        return Unreadable(refusal=Refused("invalid_row", detail), raw=[_shown(cell) for cell in cells])
    record = dict(zip(names, cells, strict=True))
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        detail = f"the row holds the byte 0x{byte:02x}; expected UTF-8. Convert the file to UTF-8"
        return Unreadable(
            refusal=Refused("not_utf8", detail), raw={name: _shown(cell) for name, cell in record.items()}
        )
    return record


def _shown(cell: str) -> str:
    return cell.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


def _lines(queue: ByteQueue) -> Iterator[str]:
    """The lines of a stream as text with their ends; bytes that are not UTF-8 become surrogates."""
    pending: list[bytes] = []
    while queue.data or queue.more():
        first, *others = queue.data.split(b"\n")
        queue.drop(len(queue.data))
        pending.append(first)
        if others:
            yield (b"".join(pending) + b"\n").decode("utf-8", errors="surrogateescape")
            for line in others[:-1]:
                yield (line + b"\n").decode("utf-8", errors="surrogateescape")
            pending = [others[-1]]
        elif sum(map(len, pending)) > MAX_RECORD_BYTES:
            raise DataError(f"{queue.name}: a line is longer than {MAX_RECORD_BYTES:,} bytes; expected less. Split it")
    if any(pending):
        yield b"".join(pending).decode("utf-8", errors="surrogateescape")


def _cells(lines: Iterator[str], delimiter: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Each non-blank row with the number of its first line. Raises DataError for a broken quote."""
    reader = _csv_reader(lines, delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}:{number}: found a broken row ({error}), from here to line {reader.line_num}; expected quotes "
                "around cells in pairs, doubled inside. The download may be incomplete, or a quote is missing: repair "
                "the file or get it again"
            ) from error
        if any(cell.strip() for cell in row):
            yield number, row


def _csv_reader(lines: Iterable[str], delimiter: str, *, strict: bool) -> _csv.Reader:
    # The library limits a cell to 128 KiB. The limit is global to the process; set it to that of all formats.
    csv.field_size_limit(MAX_RECORD_BYTES)
    return csv.reader(lines, delimiter=delimiter, strict=strict)
