"""Document lengths to a plan: which documents share a sequence, in which order. It sees nothing but integers.

The bins are found over the histogram of lengths (bins.py); here documents are laid into them. All documents of one
length are brought together and shuffled, and each place for that length in a bin takes the next of them. The sequences
are shuffled, and the documents inside each. So neither lengths nor the order of the corpus shape the order of training.

Work is cut into pieces that stay in a processor's cache, and pieces run on all cores. What a piece does depends on its
number and the seed, never on which thread does it, nor on how many there are.

>>> plan([5, 3, 2, 6], seq_len=8, seed=0).row_documents.tolist()
[2, 2]

Shape legend: D documents, R rows (sequences), T = seq_len, C classes of bins, E entries of classes (bins.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.bins import Bins, best_bins
from ismdata.errors import UsageError

#: Documents of a piece of work. Smaller pieces spend their time in calls, larger ones wait for memory.
_PIECE = 1 << 16

#: Lengths that are counted together for each count that is kept of them, and how many at most.
_LENGTHS_PER_COUNT = 8
_LARGEST_PIECE = 1 << 22

#: Documents, neighbours in the corpus, that are dealt to a piece at a time: they fill a few lines of a cache.
_DEALT_TOGETHER = 64

#: Documents that are laid into their rows at a time.
_LAID_AT_ONCE = 1 << 16

#: Rows that are laid down at a time, and how many counts of such parts are kept at most.
_ROWS_OF_A_PART = 1 << 18
_DEALT_COUNTS = 1 << 24

#: Orders of its documents that one class of bins has, where it has as many bins, and places that all these may take.
_FEWEST_ORDERS, _MOST_ORDERS = 4, 64
_ORDERED_PLACES = 1 << 19

#: What random numbers are drawn for. Each has its own stream for a seed.
_OF_PIECES, _OF_DOCUMENTS, _OF_ROWS, _INSIDE_PARTS, _INSIDE_ROWS = range(5)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every document goes. Row r holds the documents `order[offsets[r] : offsets[r + 1]]`, laid end to end."""

    order: NDArray[np.uint32]  # [D] document numbers, in the order in which they are laid down
    row_documents: NDArray[np.int32]  # [R] documents per sequence, at least 1

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self.row_documents)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where in `order` each row starts, int64[R + 1]; the last is D."""
        return _starts(self.row_documents)


def lower_bound(lengths: ArrayLike, seq_len: int) -> int:
    """The fewest sequences that hold that many tokens, ceil(sum / T), were documents liquid."""
    return -(-int(np.asarray(lengths).sum(dtype=np.int64)) // seq_len)


def plan(lengths: ArrayLike, *, seq_len: int, seed: int) -> Plan:
    """Lay documents into sequences of `seq_len` tokens. The same arguments give the same plan.

    lengths: integers[D], 1 to seq_len each. Raises UsageError for a length outside that range, naming the document.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return Plan(order=np.zeros(0, np.uint32), row_documents=np.zeros(0, np.int32))
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise UsageError(f"lengths are {lengths.dtype} of shape {lengths.shape}; expected one integer per document")
    if len(lengths) > np.iinfo(np.uint32).max:
        raise UsageError(f"{len(lengths)} documents; expected fewer than 2^32. Pack the corpus in parts")
    with ThreadPoolExecutor(_threads()) as threads:
        dealing = _Dealing.of(len(lengths), seq_len, seed)
        counts = _count(lengths, seq_len, dealing, threads)
        histogram = counts.sum(0, dtype=np.int64)
        bins = best_bins(histogram, seq_len)
        grouped = _group(lengths, counts, dealing, seed, threads)
        return _lay_down(grouped, bins, seed, threads)


def _threads() -> int:
    """More than so many threads wait for memory, not for a core."""
    return min(os.cpu_count() or 1, 16)


def _random(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=stream)))


def _starts(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of so many things begins when they are laid end to end, int64[N + 1]; the last is their sum."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def _piece(documents: int, seq_len: int) -> int:
    """How many lengths are counted at a time: so many that the counts of all pieces stay small beside the lengths."""
    return min(documents, max(_PIECE, min(_LENGTHS_PER_COUNT * (seq_len + 1), _LARGEST_PIECE)))


@dataclass(frozen=True, kw_only=True)
class _Dealing:
    """Documents dealt out to pieces in turn, neighbours in the corpus a few at a time: a piece is an even sample of the
    corpus. `shuffled` is an order for the places of a piece, one for all pieces."""

    documents: int
    pieces: int
    shuffled: NDArray[np.int64]
    dealt: NDArray[np.uint32]  # the documents of the first piece in that order

    @staticmethod
    def of(documents: int, seq_len: int, seed: int) -> _Dealing:
        pieces = -(-documents // _piece(documents, seq_len))
        turns = -(-documents // (pieces * _DEALT_TOGETHER))
        dealt = (np.arange(turns)[:, None] * (pieces * _DEALT_TOGETHER) + np.arange(_DEALT_TOGETHER)).ravel()
        shuffled = _random(seed, _OF_DOCUMENTS).permutation(len(dealt))
        return _Dealing(documents=documents, pieces=pieces, shuffled=shuffled, dealt=dealt[shuffled].astype(np.uint32))

    def piece(self, number: int, lengths: NDArray[Any]) -> NDArray[Any]:
        """The lengths of a piece, in the order of the corpus. lengths: those of all documents."""
        turn = self.pieces * _DEALT_TOGETHER
        complete = self.documents // turn * turn
        last = complete + number * _DEALT_TOGETHER
        together = lengths[:complete].reshape(-1, self.pieces, _DEALT_TOGETHER)[:, number].ravel()
        return np.concatenate([together, lengths[last : last + _DEALT_TOGETHER]])

    def order(self, number: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """The places of a piece that has `size` documents, shuffled, and the documents at these."""
        first = np.uint32(number * _DEALT_TOGETHER)
        if size == len(self.shuffled):
            return self.shuffled, self.dealt + first
        there = self.shuffled < size
        return self.shuffled[there], self.dealt[there] + first


def _count(lengths: NDArray[Any], seq_len: int, dealing: _Dealing, threads: Executor) -> NDArray[np.uint32]:
    """How many documents of each length a piece has, uint32[pieces, T + 1]. Raises UsageError for one out of range."""
    lowest, highest = int(lengths.min()), int(lengths.max())
    if not 1 <= lowest <= highest <= seq_len:
        bad = int(np.flatnonzero((lengths < 1) | (lengths > seq_len))[0])
        raise UsageError(
            f"document {bad} has {lengths[bad]} tokens; expected 1 to seq_len = {seq_len}. "
            "Split or drop over-long documents first"
        )
    counts = np.zeros((dealing.pieces, seq_len + 1), np.uint32)

    def count(number: int) -> None:
        part = dealing.piece(number, lengths).astype(np.int64, copy=False)
        counts[number] = np.bincount(part, minlength=seq_len + 1)

    _run(threads, count, len(counts))
    return counts


def _group(
    lengths: NDArray[Any], counts: NDArray[np.uint32], dealing: _Dealing, seed: int, threads: Executor
) -> NDArray[np.uint32]:
    """Document numbers by length, those of one length in a random order, uint32[D]: a counting sort.

    The pieces, each in its random order, follow one another in a random order.
    """
    grouped = np.empty(len(lengths), np.uint32)
    turn = _random(seed, _OF_PIECES).permutation(len(counts))
    ends = np.cumsum(counts[turn], axis=0, dtype=np.uint32)
    begins = _starts(ends[-1])[:-1]
    inside = np.arange(len(dealing.shuffled))
    # numpy sorts integers of up to 16 bits by their digits, in a fraction of the time that others take
    narrow = np.min_scalar_type(counts.shape[1] - 1)

    def place(nth: int) -> None:
        number = int(turn[nth])
        part = dealing.piece(number, lengths).astype(narrow)
        shuffled, documents = dealing.order(number, len(part))
        by_length = part[shuffled].argsort(kind="stable")
        # where a length goes on in `grouped`, less where it begins among the sorted documents of this piece
        shift = begins + ends[nth] - np.cumsum(counts[number], dtype=np.int64)
        places = np.repeat(shift, counts[number])
        places += inside[: len(part)]
        grouped[places] = documents[by_length]

    _run(threads, place, len(counts))
    return grouped


def _deal(bins: Bins, seed: int, threads: Executor) -> NDArray[np.uint32]:
    """Deal the bins out to parts of the training order, each to a part at random: bins of each class in each part,
    uint32[parts, C]. With the bins of a part shuffled, all orders are as likely as in a shuffle of the whole.
    """
    classes = len(bins.count)
    parts = max(1, min(bins.rows // _ROWS_OF_A_PART, _DEALT_COUNTS // classes))
    first = _starts(bins.count)
    cuts = _cut(first, _PIECE)
    dealt = np.empty((parts, classes), np.uint32)

    def deal(number: int) -> None:
        start, stop = cuts[number], cuts[number + 1]
        part = _random(seed, _OF_ROWS, number).integers(0, parts, size=int(first[stop] - first[start]))
        part *= stop - start
        part += np.repeat(np.arange(stop - start), bins.count[start:stop])
        dealt[:, start:stop] = np.bincount(part, minlength=parts * (stop - start)).reshape(parts, stop - start)

    _run(threads, deal, len(cuts) - 1)
    return dealt


def _lay_down(grouped: NDArray[np.uint32], bins: Bins, seed: int, threads: Executor) -> Plan:
    """Fill the bins with the documents of `grouped`, and put them down in a random order.

    A place in class c is where in `grouped` the documents for it begin, `count[c]` of them. The bins of a class take
    the next ones in the order of training, so all that is read at a time lies close together.
    """
    bins = _by_size(bins)
    dealt = _deal(bins, seed, threads)
    size = _sizes(bins)
    orders, begins, places = _orders(bins, size, seed)
    first_order = _starts(orders)
    before = np.cumsum(dealt, axis=0, dtype=np.uint32)
    before -= dealt
    first_row, first_document = _starts(dealt.sum(1, dtype=np.int64)), _starts(dealt @ size)
    order = np.empty(len(grouped), np.uint32)
    row_documents = np.empty(bins.rows, np.int32)

    def fill(part: int) -> None:
        # Rows are made class by class, which reads a few places of `grouped` at a time, and put where they belong.
        rows = np.arange(first_row[part + 1] - first_row[part])
        position = _random(seed, _INSIDE_PARTS, part).permutation(len(rows))
        classes = np.repeat(np.arange(len(size)), dealt[part])
        nth = rows + np.repeat(before[part] - _starts(dealt[part])[:-1], dealt[part])
        sizes = size[classes]
        row_sizes = row_documents[first_row[part] : first_row[part + 1]]
        row_sizes[position] = sizes
        target = first_document[part] + _starts(row_sizes)[position]
        origin = begins[first_order[classes] + nth % orders[classes]]
        for start, stop in pairwise(_runs(sizes)):
            inside = np.arange(sizes[start])
            at_once = max(1, _LAID_AT_ONCE // len(inside))
            for some in (slice(first, min(first + at_once, stop)) for first in range(start, stop, at_once)):
                source = places[origin[some, None] + inside]
                source += nth[some, None]
                order[target[some, None] + inside] = grouped[source]

    _run(threads, fill, len(dealt))
    return Plan(order=order, row_documents=row_documents)


def _sizes(bins: Bins) -> NDArray[np.int64]:
    """How many documents a bin of each class holds, int64[C]."""
    return np.bincount(bins.owner, weights=bins.times, minlength=len(bins.count)).astype(np.int64)


def _by_size(bins: Bins) -> Bins:
    """The same bins, the classes with the fewest documents first: rows of one size are laid down together."""
    by_size = np.argsort(_sizes(bins), kind="stable")
    rank = np.empty(len(by_size), np.int64)
    rank[by_size] = np.arange(len(by_size))
    return Bins(count=bins.count[by_size], owner=rank[bins.owner], length=bins.length, times=bins.times)


def _runs(values: NDArray[np.int64]) -> list[int]:
    """Where each run of equal values begins, and after the last one the end."""
    return [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)] if len(values) else []


def _orders(
    bins: Bins, size: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The places of each class in several random orders, which its bins take in turn.

    A class with few bins has an order for each of them. Where there are more, bins share orders: not the documents in
    them, only in which order their lengths come. Returns how many orders a class has, int64[C]; where each order begins
    in the places, int64[orders + 1]; and the places, int64[sum of orders x size].
    """
    # places of one length come one after the other in `grouped`, `count` documents for each
    by_length = np.argsort(bins.length, kind="stable")
    taken = (bins.count[bins.owner] * bins.times)[by_length]
    begin = np.empty(len(by_length), np.int64)
    begin[by_length] = _starts(taken)[:-1]
    by_class = np.argsort(bins.owner, kind="stable")
    times = bins.times[by_class]
    place = np.repeat(begin[by_class], times)
    place += (np.arange(len(place)) - np.repeat(_starts(times)[:-1], times)) * np.repeat(bins.count, size)

    most = min(max(_ORDERED_PLACES // len(place), _FEWEST_ORDERS), _MOST_ORDERS)
    orders = np.minimum(bins.count, most)
    sizes = np.repeat(size, orders).astype(np.int64)
    begins = _starts(sizes)
    source = np.repeat(np.repeat(_starts(size)[:-1], orders) - begins[:-1], sizes)
    source += np.arange(begins[-1])
    # (order, random) are sorted as pairs; what is equal in both stays as it is
    key = _random(seed, _INSIDE_ROWS).integers(0, 1 << 32, size=len(source), dtype=np.uint32)
    shuffled = np.lexsort((key, np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)))
    return orders, begins, place[source[shuffled]]


def _cut(borders: NDArray[np.int64], size: int) -> list[int]:
    """Indices into ascending `borders`, from 0 to the last, that are at least `size` apart where one step is not."""
    cuts = [0]
    while cuts[-1] < len(borders) - 1:
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(borders, borders[cuts[-1]] + size, side="right")) - 1))
    return cuts


def _run(threads: Executor, work: Callable[[int], None], pieces: int) -> None:
    """Do pieces of work on all threads. Raises what the first of them raised that failed."""
    for _ in threads.map(work, range(pieces)):
        pass
