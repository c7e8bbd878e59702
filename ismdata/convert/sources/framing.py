"""Bytes to blocks of complete records: lines, JSON arrays, objects of arrays or of records, concatenated JSON values.

A JSON array is scanned for the commas between its records, one block at a time and without parsing values, and turned
into lines, so that JSON Lines are the only form that is parsed. Memory use is constant. A truncated file is detected
and the place reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ismdata.convert.sources.blocks import LineBlock, ValueBlock
from ismdata.errors import DataError

#: Bytes read at a time. Blocks depend only on this size and the content, so shards do not depend on the workers.
BLOCK_BYTES = 4 << 20
#: Bytes scanned for structure at a time.
_WINDOW = 4 << 20
#: Limit of a record in bytes; a longer one means a broken file. Arrow's offsets end at 2 GiB.
MAX_RECORD_BYTES = 1 << 30

WHITESPACE = b" \t\r\n"
_SPACE, _LINE_BREAK, _QUOTE, _BACKSLASH, _COMMA = b' \n"\\,'
_IS_WHITESPACE = np.isin(np.arange(256), list(WHITESPACE))
#: +1 for an opening bracket, -1 for a closing one.
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1
_TRUNCATED_HINT = (
    "The download may be incomplete: get the file again. Or a closing quote or bracket is missing in that record: "
    "repair the file"
)
_STRUCTURAL = np.isin(np.arange(256), list(b'[]{}",\n'))


@dataclass(frozen=True, kw_only=True)
class Framed:
    """A block and, in an object of splits, the name of its split."""

    block: LineBlock | ValueBlock
    split: str | None = None


class ByteQueue:
    """Bytes read ahead from a stream, with their offset in it. `name` is the stream's name in errors.

    `end_lines_at_returns` makes carriage returns line breaks: some files have no other.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream = stream
        self.name = name
        self.data = b""
        self.offset = 0  # of data[0] in the stream
        self.ended = False
        self._returns = False

    def end_lines_at_returns(self) -> None:
        self._returns = True
        self.data = self.data.replace(b"\r", b"\n")

    def more(self, size: int = BLOCK_BYTES) -> bool:
        """Read at most `size` more bytes. Returns False at the end of the stream. Raises DataError beyond the limit."""
        if self.ended:
            return False
        if len(self.data) > MAX_RECORD_BYTES:
            raise DataError(
                f"{self.name}: the record at byte {self.offset + 1} is longer than {MAX_RECORD_BYTES:,} bytes; "
                "expected smaller records. Split it, or check whether a quote or a bracket is missing there"
            )
        chunk = self.stream.read(min(size, MAX_RECORD_BYTES + 1 - len(self.data)))
        self.ended = not chunk
        if self._returns:
            chunk = chunk.replace(b"\r", b"\n")
        self.data = self.data + chunk if self.data else chunk
        return not self.ended

    def drop(self, count: int) -> None:
        self.data = self.data[count:]
        self.offset += count

    def skip_whitespace(self) -> None:
        while True:
            self.drop(len(self.data) - len(self.data.lstrip(WHITESPACE)))
            if self.data or not self.more():
                return


def frame_lines(queue: ByteQueue, *, plain_text: bool) -> Iterator[Framed]:
    """One record per line, numbered by its line. Blank lines are skipped."""
    line = 1
    pending: list[bytes] = []  # joined at the next line break, so that a long line takes linear time
    while queue.data or queue.more():
        cut = queue.data.rfind(b"\n") + 1
        pending.append(queue.data[:cut] if cut else queue.data)
        tail = queue.data[cut:] if cut else b""
        queue.drop(len(queue.data))
        if cut:
            block, lines = line_block(b"".join(pending), line, plain_text=plain_text)
            pending = [tail]
            line += lines
            if len(block.starts):
                yield Framed(block=block)
        elif sum(map(len, pending)) > MAX_RECORD_BYTES:
            raise DataError(
                f"{queue.name}:{line}: the line is longer than {MAX_RECORD_BYTES:,} bytes; expected less. Split it"
            )
    block, _ = line_block(b"".join(pending), line, plain_text=plain_text)
    if len(block.starts):
        yield Framed(block=block)


def line_block(data: bytes, first: int, *, plain_text: bool = False) -> tuple[LineBlock, int]:
    """The non-blank lines of `data`, numbered from `first`, and the number of all lines."""
    if not data:
        none = np.empty(0, np.int64)
        return LineBlock(data=data, starts=none, ends=none, numbers=none, plain_text=plain_text), 0
    array = np.frombuffer(data, np.uint8)
    breaks = np.flatnonzero(array == _LINE_BREAK)
    ends = breaks if len(breaks) and breaks[-1] == len(data) - 1 else np.append(breaks, len(data))
    starts = np.append(0, ends[:-1] + 1)
    starts, ends = _strip(data, array, starts, ends.copy())
    kept = starts < ends
    numbers = first + np.flatnonzero(kept)
    block = LineBlock(data=data, starts=starts[kept], ends=ends[kept], numbers=numbers, plain_text=plain_text)
    return block, len(kept)


def _strip(
    data: bytes, array: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Borders moved inwards past whitespace: four bytes at most by numpy for all records, more by `bytes.strip`."""
    for _ in range(4):
        full = np.flatnonzero(starts < ends)
        ends[full] -= _IS_WHITESPACE[array[ends[full] - 1]]
        full = np.flatnonzero(starts < ends)
        starts[full] += _IS_WHITESPACE[array[starts[full]]]
    full = np.flatnonzero(starts < ends)
    for row in full[_IS_WHITESPACE[array[starts[full]]] | _IS_WHITESPACE[array[ends[full] - 1]]].tolist():
        text = data[starts[row] : ends[row]]
        ends[row] -= len(text) - len(text.rstrip(WHITESPACE))
        starts[row] = min(starts[row] + len(text) - len(text.lstrip(WHITESPACE)), ends[row])
    return starts, ends


def frame_array(queue: ByteQueue, *, split: str | None = None) -> Iterator[Framed]:
    """The records of the array that comes next. Leaves the queue after its `]`. Raises DataError."""
    queue.skip_whitespace()
    _expect(queue, b"[", "a JSON array")
    name = queue.name if split is None else f"{queue.name}:{split}"
    yield from _frame_elements(queue, name=name, split=split, closing=b"]")


def frame_entries(queue: ByteQueue) -> Iterator[Framed]:
    """A file that is an object of records by id. Each record gets its key, see `blocks.with_key`."""
    queue.skip_whitespace()
    _expect(queue, b"{", "an object of records")
    yield from _frame_elements(queue, name=queue.name, split=None, closing=b"}")
    _expect_end(queue)


def _frame_elements(queue: ByteQueue, *, name: str, split: str | None, closing: bytes) -> Iterator[Framed]:
    """The elements of an array or the entries of an object, from after the opening bracket to after `closing`."""
    number = 1
    while True:
        if not queue.data:
            queue.more()
        cut, ended = 0, False
        while not cut:
            buffer = np.frombuffer(queue.data, np.uint8)
            structure = _scan(buffer)
            closed = structure.places[structure.depth < 0]
            ended = bool(len(closed))
            borders = structure.places[(structure.depth == 0) & (structure.bytes == _COMMA)]
            if ended:
                borders = np.append(borders[borders < closed[0]], closed[0])
            if len(borders):
                cut = int(borders[-1]) + 1
            elif not queue.more(max(BLOCK_BYTES, len(queue.data))):
                raise _truncated(queue, name, number, closing)
        found = queue.data[cut - 1 : cut]
        if ended and found != closing:
            place = queue.offset + cut
            raise DataError(
                f"{name}: found {found.decode()!r} at byte {place}; expected {closing.decode()!r} or another record. "
                "Repair the file"
            )
        block = _array_block(queue, buffer[:cut], structure, borders, name, number, keyed=closing == b"}")
        if ended and number == len(borders) == 1 and not len(block.starts):
            queue.drop(cut)
            return  # nothing inside
        _check_records(queue, block, borders, name, number)
        queue.drop(cut)
        number += len(borders)
        yield Framed(block=block, split=split)
        if ended:
            return


@dataclass(frozen=True, kw_only=True)
class _Structure:
    """The structural bytes of JSON at the outermost level, and all line breaks, both only outside strings.

    Attributes:
        places: int64[K], the offset of each.
        bytes: uint8[K], the byte itself.
        depth: int64[K], the nesting depth after it.
        broken: The offset of the first line break inside a string, or -1.
    """

    places: NDArray[np.int64]
    bytes: NDArray[np.uint8]
    depth: NDArray[np.int64]
    broken: int


def _scan(buffer: NDArray[np.uint8]) -> _Structure:
    """The structure of JSON that begins outside a string, at depth 0.

    Scans one window at a time and keeps nothing of deeper levels, so that a large record takes little memory beyond its
    bytes.
    """
    found: list[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]] = []
    broken, depth, inside, escaped = -1, 0, False, False
    for start in range(0, max(len(buffer), 1), _WINDOW):
        window = buffer[start : start + _WINDOW]
        places = np.flatnonzero(_STRUCTURAL[window])
        kinds = window[places]
        quote = kinds == _QUOTE
        quoted, escaped = _escaped(window, escaped)
        if quoted is not None:
            quote &= ~quoted[places]
        within = (np.cumsum(quote) + inside) & 1 == 1
        inside = bool(within[-1]) if len(within) else inside
        if broken < 0:
            torn = places[within & (kinds == _LINE_BREAK)]
            broken = start + int(torn[0]) if len(torn) else -1
        outside = ~within & (kinds != _QUOTE)
        places, kinds = places[outside], kinds[outside]
        levels = depth + np.cumsum(_DEPTH[kinds], dtype=np.int64)
        depth = int(levels[-1]) if len(levels) else depth
        kept = (levels <= 0) | (kinds == _LINE_BREAK)
        found.append((start + places[kept], kinds[kept], levels[kept]))
    return _Structure(
        places=np.concatenate([places for places, _, _ in found]),
        bytes=np.concatenate([kinds for _, kinds, _ in found]),
        depth=np.concatenate([levels for _, _, levels in found]),
        broken=broken,
    )


def _escaped(window: NDArray[np.uint8], first: bool) -> tuple[NDArray[np.bool_] | None, bool]:
    """Which bytes are escaped, that is, follow an odd number of backslashes.

    Args:
        window: uint8[N].
        first: Whether the first byte of the window is escaped.

    Returns:
        bool[N], or None if no byte is escaped; and whether the first byte of the next window is.
    """
    escapes = np.flatnonzero(window == _BACKSLASH)
    if not len(escapes) and not first:
        return None, False
    if first:
        escapes = np.insert(escapes + 1, 0, 0)  # as if the backslash before the window were its first byte
    last = np.flatnonzero(np.append(np.diff(escapes) != 1, True))
    lengths = np.diff(last, prepend=-1)
    escaped = np.zeros(len(window) + 1 + first, np.bool_)
    escaped[escapes[last[lengths % 2 == 1]] + 1] = True
    return escaped[first:], bool(escaped[-1])


def _array_block(
    queue: ByteQueue,
    buffer: NDArray[np.uint8],
    structure: _Structure,
    borders: NDArray[np.int64],
    name: str,
    number: int,
    *,
    keyed: bool,
) -> LineBlock:
    """The records between `borders` as lines: line breaks inside them become spaces, the borders line breaks."""
    if 0 <= structure.broken < len(buffer):
        record = number + int(np.searchsorted(borders, structure.broken))
        place = queue.offset + structure.broken + 1
        raise DataError(
            f"{name}:record {record}: found a line break inside a string at byte {place}; expected \\n instead. "
            "Or a quote is missing before it: repair the file"
        )
    lines = buffer.copy()
    lines[structure.places[(structure.bytes == _LINE_BREAK) & (structure.places < len(lines))]] = _SPACE
    lines[borders] = _LINE_BREAK
    data = lines.tobytes()
    starts, ends = _strip(data, lines, np.append(0, borders[:-1] + 1), borders.copy())
    kept = starts < ends
    numbers = number + np.arange(len(borders))
    return LineBlock(data=data, starts=starts[kept], ends=ends[kept], numbers=numbers[kept], document=name, keyed=keyed)


def _check_records(queue: ByteQueue, block: LineBlock, borders: NDArray[np.int64], name: str, number: int) -> None:
    missing = np.setdiff1d(number + np.arange(len(borders)), block.numbers)
    if len(missing):
        place = queue.offset + int(borders[missing[0] - number]) + 1
        raise DataError(
            f"{name}: found an extra comma and no record before byte {place}; expected record {missing[0]}. "
            "Repair the file"
        )


def _truncated(queue: ByteQueue, name: str, number: int, closing: bytes) -> DataError:
    end = queue.offset + len(queue.data)
    whole = "array" if closing == b"]" else "object"
    inside = f"record {number}" if queue.data.strip(WHITESPACE) else f"the {whole}"
    return DataError(
        f"{name}: found the end of the file at byte {end}, inside {inside}; expected {closing.decode()!r} at the "
        f"end of the {whole} ({number - 1} records are complete). {_TRUNCATED_HINT}"
    )


def _expect(queue: ByteQueue, wanted: bytes, what: str) -> None:
    found = queue.data[:1]
    if found != wanted:
        shown = repr(found.decode("latin-1")) if found else "the end of the file"
        raise DataError(
            f"{queue.name}: found {shown} at byte {queue.offset + 1}; expected {wanted.decode()!r} ({what}). "
            "Repair the file or get it again"
        )
    queue.drop(1)


def frame_document(queue: ByteQueue) -> Iterator[Framed]:
    """A file that is one JSON array."""
    yield from frame_array(queue)
    _expect_end(queue)


def frame_splits(queue: ByteQueue) -> Iterator[Framed]:
    """A file that is an object of arrays of records, such as `{"train": […], "valid": […]}`."""
    queue.skip_whitespace()
    _expect(queue, b"{", "an object of splits")
    while True:
        queue.skip_whitespace()
        key = re.match(rb'"(?:[^"\\\n]|\\.)*"', queue.data)
        while key is None and queue.more():
            key = re.match(rb'"(?:[^"\\\n]|\\.)*"', queue.data)
        if key is None:
            _expect(queue, b'"', "the name of a split")
            raise DataError(f"{queue.name}: found a broken name at byte {queue.offset}; expected the name of a split")
        split = _text(queue, key.group())
        queue.drop(key.end())
        queue.skip_whitespace()
        _expect(queue, b":", f"the value of {split!r}")
        yield from frame_array(queue, split=split)
        queue.skip_whitespace()
        if queue.data[:1] == b"}":
            queue.drop(1)
            _expect_end(queue)
            return
        _expect(queue, b",", "another split, or '}'")


def _text(queue: ByteQueue, key: bytes) -> str:
    """The JSON string `key` as text that UTF-8 can encode. Raises DataError."""
    try:
        return str(json.loads(key)).encode("utf-8", errors="backslashreplace").decode("utf-8")
    except ValueError as error:
        raise DataError(
            f"{queue.name}: found the broken name {key[:80]!r} at byte {queue.offset + 1} ({error}); expected a JSON "
            "string in UTF-8. Repair the file"
        ) from error


def frame_values(queue: ByteQueue) -> Iterator[Framed]:
    """Concatenated objects or lists, each on any number of lines, with or without a comma between two."""
    number = 1
    queue.skip_whitespace()
    while queue.data:
        structure = _scan(np.frombuffer(queue.data, np.uint8))
        ends = structure.places[(structure.depth == 0) & (_DEPTH[structure.bytes] < 0)] + 1
        if not len(ends):
            if not queue.more(max(BLOCK_BYTES, len(queue.data))):
                if number > 1 and queue.data.strip(WHITESPACE) == b",":
                    return
                raise DataError(
                    f"{queue.name}: found the end of the file at byte {queue.offset + len(queue.data)}, inside record "
                    f"{number}; expected its end. {_TRUNCATED_HINT}"
                )
            continue
        if 0 <= structure.broken < ends[-1]:
            raise DataError(
                f"{queue.name}: found a line break inside a string at byte {queue.offset + structure.broken + 1}; "
                "expected \\n instead. Or a quote is missing before it: repair the file"
            )
        borders = [0, *ends.tolist()]
        texts = [queue.data[start:end].strip(WHITESPACE).replace(b"\n", b" ") for start, end in pairwise(borders)]
        texts = [_without_comma(text) if at or number > 1 else text for at, text in enumerate(texts)]
        lengths = np.array([len(text) for text in texts])
        starts = np.append(0, np.cumsum(lengths + 1)[:-1])
        numbers = number + np.arange(len(texts))
        block = LineBlock(
            data=b"\n".join(texts), starts=starts, ends=starts + lengths, numbers=numbers, document=queue.name
        )
        yield Framed(block=block)
        number += len(texts)
        queue.drop(borders[-1])
        queue.skip_whitespace()


def frame_whole(queue: ByteQueue) -> Iterator[Framed]:
    """A text that is one record."""
    while queue.more():
        pass
    text = queue.data.decode("utf-8", errors="surrogateescape")
    queue.drop(len(queue.data))
    yield Framed(block=ValueBlock(values=[text], numbers=np.array([1])))


def _without_comma(text: bytes) -> bytes:
    """A value without the comma between it and the value before."""
    return text[1:].lstrip(WHITESPACE) if text[:1] == b"," else text


def _expect_end(queue: ByteQueue) -> None:
    queue.skip_whitespace()
    if queue.data:
        shown = repr(queue.data[:20].decode("utf-8", errors="replace"))
        raise DataError(
            f"{queue.name}: found {shown} at byte {queue.offset + 1}, after the end of the JSON; expected the end "
            "of the file. Repair the file or get it again"
        )
