"""Group documents by length, shuffled within each length: a counting sort in parallel.

Documents are dealt into chunks that fit into a processor's cache; each chunk is shuffled and sorted by length, and the
sorted chunks are merged.

Shape legend: D documents, T = seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.errors import UsageError
from ismdata.pack.planning.counting_sort import sort_by_key
from ismdata.pack.planning.work import CHUNK_ORDER, DOCUMENT_ORDER, Runner, random_stream

#: Documents per chunk. With smaller chunks calls dominate, larger ones do not fit into the cache.
_CHUNK = 1 << 17

#: A chunk has at least this many documents per possible length, so that its histogram is small beside its lengths.
_DOCUMENTS_PER_LENGTH = 8

#: The most documents of a chunk, however long sequences are.
_LARGEST_CHUNK = 1 << 22

#: Documents that are neighbours in the corpus and go to the same chunk: they fill a few cache lines.
_NEIGHBOURS = 64


def group_by_length(
    lengths: NDArray[Any], seq_len: int, seed: int, run: Runner, *, buffer: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Group documents by length, in a random order within each length.

    Args:
        lengths: integers[D], 1 to T.
        seq_len: T.
        seed: Seed of the random order.
        run: Runs pieces of work on threads.
        buffer: uint32[D], overwritten.

    Returns:
        The documents by length, uint32[D], and the number of documents of each length, int64[T + 1].

    Raises:
        UsageError: If a length is out of range.
    """
    chunks = Chunks.deal(len(lengths), seq_len, seed)
    before = sort_chunks(lengths, buffer, seq_len, chunks, run)
    return merge_chunks(buffer, before, chunks, seed, run), before[-1].astype(np.int64)


def _chunk_size(documents: int, seq_len: int) -> int:
    """The most documents per chunk."""
    return min(documents, max(_CHUNK, min(_DOCUMENTS_PER_LENGTH * (seq_len + 1), _LARGEST_CHUNK)))


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Documents dealt into chunks in turn, some neighbours at a time, so that each chunk samples the corpus evenly.

    All chunks are shuffled by the same permutation. Each starts at another place in it, because documents in
    neighbouring chunks may be neighbours in the corpus too; smaller chunks skip places that they do not have.

    Attributes:
        documents: D.
        sizes: int64[chunks], documents per chunk; the first chunk has the most.
        starts: int64[chunks], where each chunk starts in the permutation.
        places: The permutation of the places in a chunk, stored twice so that a window can wrap around.
        first: The documents of the first chunk in that order, stored twice.
    """

    documents: int
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    places: NDArray[np.int64]
    first: NDArray[np.uint32]

    @staticmethod
    def deal(documents: int, seq_len: int, seed: int) -> Chunks:
        """Deal documents into chunks."""
        count = -(-documents // _chunk_size(documents, seq_len))
        turns, rest = divmod(documents, count * _NEIGHBOURS)
        last = np.clip(rest - np.arange(count) * _NEIGHBOURS, 0, _NEIGHBOURS)
        sizes = turns * _NEIGHBOURS + last
        random = random_stream(seed, DOCUMENT_ORDER)
        places = np.tile(random.permutation(sizes[0]), 2)
        starts = random.integers(0, sizes[0], size=count)
        turn, place = np.divmod(places, _NEIGHBOURS)
        first = (turn * (count * _NEIGHBOURS) + place).astype(np.uint32)
        return Chunks(documents=documents, sizes=sizes, starts=starts, places=places, first=first)

    def take(self, chunk: int, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values of a chunk's documents in the order of the corpus. values: [D]."""
        taken = np.empty(self.sizes[chunk], values.dtype)
        turn = len(self.sizes) * _NEIGHBOURS
        start, turns = chunk * _NEIGHBOURS, self.documents // turn
        complete = values[: turns * turn].reshape(turns, turn)
        taken[: turns * _NEIGHBOURS].reshape(turns, _NEIGHBOURS)[:] = complete[:, start : start + _NEIGHBOURS]
        last = values[turns * turn :]
        taken[turns * _NEIGHBOURS :] = last[start : start + _NEIGHBOURS]
        return taken

    def shuffle(self, chunk: int, values: NDArray[Any]) -> NDArray[Any]:
        """Return values of a chunk's documents, as `take` returns them, in the chunk's random order."""
        return values.take(self._select(chunk, self.places))

    def documents_of(self, chunk: int) -> NDArray[np.uint32]:
        """Return the documents of a chunk in its random order."""
        documents: NDArray[np.uint32] = self._select(chunk, self.first) + np.uint32(chunk * _NEIGHBOURS)
        return documents

    def _select(self, chunk: int, permuted: NDArray[Any]) -> NDArray[Any]:
        """The part of a permuted array that belongs to a chunk."""
        start, end = self.starts[chunk], self.starts[chunk] + self.sizes[0]
        size, largest = self.sizes[chunk], permuted[start:end]
        return largest if size == len(largest) else largest[self.places[start:end] < size]


def sort_chunks(
    lengths: NDArray[Any], by_length: NDArray[np.uint32], seq_len: int, chunks: Chunks, run: Runner
) -> NDArray[np.uint32]:
    """Fill `by_length`, uint32[D], with the documents of one chunk after another, each chunk sorted by length.

    Within a chunk, documents of the same length are in random order.

    Returns:
        For each chunk and length the number of documents in earlier chunks, uint32[chunks + 1, T + 1]; the last row is
        the histogram of all lengths.

    Raises:
        UsageError: If a length is out of range.
    """
    before = np.zeros((len(chunks.sizes) + 1, seq_len + 1), np.uint32)
    offsets = offsets_of(chunks.sizes)

    def sort(chunk: int) -> None:
        own = chunks.take(chunk, lengths)
        if own.min() < 1 or own.max() > seq_len:
            raise _out_of_range(lengths, seq_len)
        key = chunks.shuffle(chunk, own.astype(np.int32, copy=False))
        own_by_length = by_length[offsets[chunk] : offsets[chunk + 1]]
        before[chunk + 1], own_by_length[:] = sort_by_key(key, chunks.documents_of(chunk), keys=seq_len + 1)

    run(sort, len(chunks.sizes))
    for earlier, own in pairwise(before):
        own += earlier
    return before


def _out_of_range(lengths: NDArray[Any], seq_len: int) -> UsageError:
    """The error about the first length that is out of range."""
    bad = int(np.flatnonzero((lengths < 1) | (lengths > seq_len))[0])
    return UsageError(
        f"document {bad} has {lengths[bad]} tokens; expected 1 to seq_len = {seq_len}. "
        "Split or drop over-long documents first"
    )


def merge_chunks(
    by_length: NDArray[np.uint32], before: NDArray[np.uint32], chunks: Chunks, seed: int, run: Runner
) -> NDArray[np.uint32]:
    """Merge sorted chunks: all documents by length, uint32[D], those of a length chunk after chunk.

    The chunk that comes first is drawn for each length, so that the documents of a chunk, which may be neighbours in
    the corpus, are at different places for each length. The arguments are as `sort_chunks` leaves them.
    """
    merged = np.empty(chunks.documents, np.uint32)
    offsets = offsets_of(chunks.sizes)
    total = before[-1]
    first = random_stream(seed, CHUNK_ORDER).integers(0, len(chunks.sizes), size=len(total))
    starts = offsets_of(total)[:-1] - before[first, np.arange(len(total))]
    inside = np.arange(chunks.sizes[0])

    def merge(chunk: int) -> None:
        count = before[chunk + 1] - before[chunk]
        # For each length: its place in `merged` less its place in this chunk.
        shift = starts + before[chunk]
        shift += np.where(chunk < first, total, 0)
        shift -= offsets_of(count)[:-1]
        places = np.repeat(shift, count)
        places += inside[: len(places)]
        merged[places] = by_length[offsets[chunk] : offsets[chunk + 1]]

    run(merge, len(chunks.sizes))
    return merged
