"""128-bit digests of conversations: two conversations are the same if their digests are.

A digest covers roles, contents, names, tool calls and their ids, reasoning and tools. It does not cover where the
conversation came from and how it is trained (`id`, `source`, `meta`, `train`, `weight`).

The texts of a conversation are adjacent in an Arrow buffer. So the digest hashes a few slices of buffers, joined by
Arrow, and no message becomes a Python object.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from ismdata.conversation import ROLES

#: Texts of a message other than its content. Their indices are bit positions in the hashed bytes: never reorder them.
_TEXTS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
#: Rows that `count_repeats` sorts at a time.
_SORTED = 1 << 22

Digests = NDArray[np.uint64]  # [N, 2]


def digests(rows: pa.Table, *, roles: bool = True) -> Digests:
    """The digest of each of N conversations. It depends on nothing but the conversation.

    Args:
        rows: N rows of CONVERSATION_SCHEMA.
        roles: Whether roles count. Without them, a dialogue and the same dialogue with its sides swapped are the same.

    Returns:
        uint64[N, 2]
    """
    parts = [np.empty((0, 2), np.uint64), *(_batch_digests(batch, roles) for batch in rows.to_batches())]
    return np.concatenate(parts)


def _batch_digests(batch: pa.RecordBatch, roles: bool) -> Digests:
    """Hash the pieces of each conversation. Each piece tells how to read the next, so the bytes are unambiguous."""
    joined = pc.binary_join_element_wise(*_pieces(batch, roles), pa.scalar(b"", pa.large_binary()))
    ends = np.frombuffer(joined.buffers()[1], np.int64, len(joined) + 1, joined.offset * 8)
    data = memoryview(joined.buffers()[2] or b"")
    slices = map(slice, ends[:-1].tolist(), ends[1:].tolist())
    hashed = b"".join(map(xxhash.xxh3_128_digest, map(memoryview.__getitem__, repeat(data), slices)))
    return np.frombuffer(hashed, ">u8").astype(np.uint64).reshape(-1, 2)


def _pieces(batch: pa.RecordBatch, roles: bool) -> Iterator[pa.Array]:
    """The hashed bytes of N conversations in several pieces, large_binary[N] each.

    First a 64-bit word with the number of messages, then a word per message, then the texts by column. The word of a
    message holds its role, which texts it has, and the length of its content.
    """
    count = len(batch)
    messages = batch.column("messages")
    first = messages.offsets.to_numpy().astype(np.int64)
    fields = messages.flatten()
    first -= first[0]
    tools = batch.column("tools")
    yield _words(np.diff(first) << 1 | _valid(tools), np.arange(count + 1))

    contents, places = _text(fields.field("content"))
    words = np.diff(places) << 8 | _valid(fields.field("content")).astype(np.int64) << 7
    if roles:
        codes = pc.index_in(fields.field("role"), value_set=pa.array(ROLES))
        words |= codes.to_numpy(zero_copy_only=False).astype(np.int64)
    later = []
    for bit, name in enumerate(_TEXTS):
        column = fields.field(name)
        if column.null_count == len(column):
            continue
        valid = _valid(column)
        words |= valid.astype(np.int64) << (bit + 3)
        present = np.concatenate([[0], np.cumsum(valid)])
        data, ends = _text(column)
        later += [_words(np.diff(ends)[valid], present[first]), _cut(data, ends[first])]
    yield _words(words, first)
    yield _cut(contents, places[first])
    yield from later
    if tools.null_count < count:
        yield _cut(*_text(tools))


def _valid(column: pa.Array) -> NDArray[np.bool_]:
    if not column.null_count:
        return np.ones(len(column), np.bool_)
    valid: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _text(column: pa.Array) -> tuple[pa.Buffer, NDArray[np.int64]]:
    """The bytes of a string column and the offsets of its values, int64[N + 1]. A null is empty."""
    if column.null_count:  # the bytes of a null value can be anything
        column = pc.fill_null(column, "")
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4) if len(column) else np.zeros(1)
    return data or pa.py_buffer(b""), ends.astype(np.int64)


def _words(words: NDArray[np.int64], offsets: NDArray[np.int64]) -> pa.Array:
    """The words offsets[i]:offsets[i + 1] as bytes, large_binary[N]."""
    return _cut(pa.py_buffer(np.ascontiguousarray(words, "<i8")), offsets * 8)


def _cut(data: pa.Buffer, offsets: NDArray[np.int64]) -> pa.Array:
    """The bytes offsets[i]:offsets[i + 1] of a buffer without copying them, large_binary[N]."""
    ends = pa.py_buffer(np.ascontiguousarray(offsets, np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, [None, ends, data])


class DigestSet:
    """A growing set of digests. It needs 16 bytes per digest, and up to 48 while it grows.

    It consists of runs that are sorted by the first half of the digests. Each run is at most half as long as the one
    before it, so that a lookup searches few runs.
    """

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def contains(self, digests: Digests) -> NDArray[np.bool_]:
        """Which of these digests are in the set, bool[N]."""
        found = np.zeros(len(digests), np.bool_)
        for run in self._runs:
            at = np.searchsorted(run[:, 0], digests[:, 0])
            while True:  # repeats only for digests with equal first halves
                at = np.minimum(at, len(run) - 1)
                same = run[at, 0] == digests[:, 0]
                found |= same & (run[at, 1] == digests[:, 1])
                if not (same & ~found & (at < len(run) - 1)).any():
                    break
                at = at + 1
        return found

    def add(self, digests: Digests) -> NDArray[np.bool_]:
        """Add digests, and return which of them were not in the set before, bool[N]. Of equal ones the first counts."""
        new = ~is_repeat(digests)
        rows = np.flatnonzero(new)
        rows = rows[np.argsort(digests[rows, 0])]  # sorted lookups use the CPU cache well
        known = self.contains(digests[rows])
        new[rows[known]] = False
        run = digests[rows[~known]]
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run = run[np.argsort(run[:, 0], kind="stable")]  # the stable sort merges two sorted runs
        if len(run):
            self._runs.append(run)
        return new


def is_repeat(digests: Digests) -> NDArray[np.bool_]:
    """Which rows are equal to an earlier one, bool[N].

    >>> is_repeat(np.array([[7, 1], [7, 2], [7, 1]], np.uint64)).tolist()
    [False, False, True]
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    again = np.zeros(len(digests), np.bool_)
    again[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return again


def count_repeats(digests: Digests) -> int:
    """How many rows are equal to an earlier one.

    It sorts one range of values at a time, so that a memory-mapped file needs bounded memory.
    """
    parts = len(digests) // _SORTED + 1
    halves = digests[:, 0]
    borders = [(part << 64) // parts for part in range(parts + 1)]
    count = 0
    for low, high in pairwise(borders):
        within = digests[(halves >= np.uint64(low)) & (halves <= np.uint64(high - 1))]
        ordered = np.sort(within[:, 0])
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        count += int(is_repeat(within[np.isin(within[:, 0], again)]).sum())
    return count
