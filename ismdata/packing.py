"""Document lengths to a plan: which documents share a sequence, in which order. It sees nothing but integers.

The bins are found over the histogram of lengths (best_bins.py); here documents are laid into them. All documents of one
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
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from ismdata.best_bins import best_bins
from ismdata.bins import Bins
from ismdata.errors import UsageError

#: Documents of a piece of work. Smaller pieces spend their time in calls, larger ones wait for memory.
_PIECE = 1 << 16

#: Lengths that are counted together for each count that is kept of them, and how many at most.
_LENGTHS_PER_COUNT = 8
_LARGEST_PIECE = 1 << 22

#: Documents, neighbours in the corpus, that are dealt to a piece at a time: they fill a few lines of a cache.
_DEALT_TOGETHER = 64

#: Documents that are laid into their rows at a time.
_LAID_AT_ONCE = 1 << 15

#: Rows that are laid down at a time, and how many counts of such parts are kept at most.
_ROWS_OF_A_PART = 1 << 18
_DEALT_COUNTS = 1 << 24

#: Orders of its documents that one class of bins has, where it has as many bins, and places that all these may take.
#: Powers of two.
_FEWEST_ORDERS, _MOST_ORDERS = 4, 64
_ORDERED_PLACES = 1 << 20

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
        _check(lengths, seq_len, threads)
        dealing = _Dealing.of(len(lengths), seq_len, seed)
        order = np.empty(len(lengths), np.uint32)
        shuffled = order.view(np.min_scalar_type(seq_len))[: len(order)]  # until the order itself is laid down
        counts = _count(lengths, shuffled, seq_len, dealing, threads)
        turn = _random(seed, _OF_PIECES).permutation(len(counts))
        before, total = _before(counts, turn)
        grouped = _group(shuffled, counts, before, turn, dealing, threads)
        bins = best_bins(total.astype(np.int64), seq_len)
        return Plan(order=order, row_documents=_lay_down(grouped, bins, order, seed, threads))


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
    corpus. `places` is an order for the places of a piece, one for all: what a shorter one lacks is left out."""

    documents: int
    sizes: NDArray[np.int64]  # [pieces] how many documents a piece has
    places: NDArray[np.int64]
    first: NDArray[np.uint32]  # the documents of the first piece in that order

    @staticmethod
    def of(documents: int, seq_len: int, seed: int) -> _Dealing:
        pieces = -(-documents // _piece(documents, seq_len))
        turns, left = divmod(documents, pieces * _DEALT_TOGETHER)
        last = np.clip(left - np.arange(pieces) * _DEALT_TOGETHER, 0, _DEALT_TOGETHER)
        places = _random(seed, _OF_DOCUMENTS).permutation(turns * _DEALT_TOGETHER + int(last[0]))
        turn, place = np.divmod(places, _DEALT_TOGETHER)
        first = (turn * (pieces * _DEALT_TOGETHER) + place).astype(np.uint32)
        return _Dealing(documents=documents, sizes=turns * _DEALT_TOGETHER + last, places=places, first=first)

    def take(self, number: int, what: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """What the documents of a piece have, in the order of the corpus, as `dtype`. what: that of all documents."""
        taken = np.empty(self.sizes[number], dtype)
        together, turn = _DEALT_TOGETHER, len(self.sizes) * _DEALT_TOGETHER
        start, turns = number * together, self.documents // turn
        complete = what[: turns * turn].reshape(turns, turn)
        taken[: turns * together].reshape(turns, together)[:] = complete[:, start : start + together]
        last = what[turns * turn :]
        taken[turns * together :] = last[start : start + together]
        return taken

    def shuffled(self, number: int) -> NDArray[np.int64]:
        """The places of a piece in their order."""
        return self._here(number, self.places)

    def shuffled_documents(self, number: int, which: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The documents of a piece, those at `which` of its shuffled places."""
        documents = self._here(number, self.first).take(which)
        documents += np.uint32(number * _DEALT_TOGETHER)
        return documents

    def _here(self, number: int, what: NDArray[Any]) -> NDArray[Any]:
        size = int(self.sizes[number])
        return what if size == len(what) else what[self.places < size]


def _check(lengths: NDArray[Any], seq_len: int, threads: Executor) -> None:
    """Raises UsageError for the first length out of range."""

    def in_range(start: int) -> bool:
        part = lengths[start : start + _PIECE]
        return bool(part.min() >= 1 and part.max() <= seq_len)

    starts = range(0, len(lengths), _PIECE)
    for start, good in zip(starts, threads.map(in_range, starts), strict=True):
        if not good:
            part = lengths[start : start + _PIECE]
            bad = start + int(np.flatnonzero((part < 1) | (part > seq_len))[0])
            raise UsageError(
                f"document {bad} has {lengths[bad]} tokens; expected 1 to seq_len = {seq_len}. "
                "Split or drop over-long documents first"
            )


def _count(
    lengths: NDArray[Any], shuffled: NDArray[Any], seq_len: int, dealing: _Dealing, threads: Executor
) -> NDArray[np.uint32]:
    """How many documents of each length a piece has, uint32[pieces, T + 1].

    Fills `shuffled`, [D], with the lengths, piece after piece, those of a piece in its random order.
    """
    counts = np.empty((len(dealing.sizes), seq_len + 1), np.uint32)
    starts = _starts(dealing.sizes)

    def count(number: int) -> None:
        part = dealing.take(number, lengths, shuffled.dtype)
        counts[number] = np.bincount(part, minlength=seq_len + 1)
        part.take(dealing.shuffled(number), out=shuffled[starts[number] : starts[number + 1]], mode="clip")

    _run(threads, count, range(len(counts)))
    return counts


def _group(
    shuffled: NDArray[Any],
    counts: NDArray[np.uint32],
    before: NDArray[np.uint32],
    turn: NDArray[np.int64],
    dealing: _Dealing,
    threads: Executor,
) -> NDArray[np.uint32]:
    """Document numbers by length, those of one length in a random order, uint32[D]: a counting sort.

    The pieces, each in its random order, follow one another in `turn`; `before` says how many documents of a length
    come before those of a piece.
    """
    grouped = np.empty(dealing.documents, np.uint32)
    starts = _starts(dealing.sizes)
    begins = _starts(counts[turn[-1]] + before[turn[-1]])[:-1]
    inside = np.arange(dealing.sizes.max())

    def place(number: int) -> None:
        # numpy sorts integers of up to 16 bits by their digits, in a fraction of the time that others take
        by_length = shuffled[starts[number] : starts[number + 1]].argsort(kind="stable")
        # where a length goes on in `grouped`, less where it begins among the sorted documents of this piece
        count = counts[number].astype(np.int64)
        shift = begins + before[number]
        shift -= _starts(count)[:-1]
        places = np.repeat(shift, count)
        places += inside[: len(places)]
        grouped[places] = dealing.shuffled_documents(number, by_length)

    _run(threads, place, turn.tolist())
    return grouped


def _before(counts: NDArray[np.uint32], turn: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """What rows sum to that come before each one as they take their turn, uint32[N, K], and what all do, uint32[K]."""
    before = np.empty_like(counts)
    total = np.zeros(counts.shape[1], np.uint32)
    for number in turn:
        before[number] = total
        total += counts[number]
    return before, total


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

    _run(threads, deal, range(len(cuts) - 1))
    return dealt


def _lay_down(
    grouped: NDArray[np.uint32], bins: Bins, order: NDArray[np.uint32], seed: int, threads: Executor
) -> NDArray[np.int32]:
    """Fill the bins with the documents of `grouped`, and put them down in a random order: in `order`, uint32[D].

    A place in class c is where in `grouped` the documents for it begin, `count[c]` of them. The bins of a class take
    the next ones in the order of training, so all that is read at a time lies close together. Returns how many
    documents each row has, int32[R].
    """
    bins = _by_size(bins)
    dealt = _deal(bins, seed, threads)
    size = _sizes(bins)
    most, first_order, kinds = _orders(bins, size, seed)
    before, _ = _before(dealt, np.arange(len(dealt)))
    first_row, first_document = _starts(dealt.sum(1, dtype=np.int64)), _starts(dealt @ size)
    row_documents = np.empty(bins.rows, np.int32)
    # as many neighbours in `order` as a row has documents, wherever they begin
    neighbours = [sliding_window_view(order, kind.places.shape[1], writeable=True) for kind in kinds]

    def fill(part: int) -> None:
        # Rows are made class by class, which reads a few places of `grouped` at a time, and put where they belong.
        count = dealt[part].astype(np.int64)
        starts = _starts(count)
        position = _random(seed, _INSIDE_PARTS, part).permutation(starts[-1])
        sizes = row_documents[first_row[part] : first_row[part + 1]]
        sizes[position] = np.repeat(size, count)
        target = _starts(sizes).take(position)
        target += first_document[part]
        nth = np.arange(starts[-1])
        nth += np.repeat(before[part] - starts[:-1], count)
        ordered = nth & (most - 1)
        ordered += np.repeat(first_order, count)
        for kind, rows in zip(kinds, neighbours, strict=True):
            end = int(starts[kind.end])
            at_once = max(1, _LAID_AT_ONCE // kind.places.shape[1])
            for start in range(int(starts[kind.first]), end, at_once):
                some = slice(start, min(start + at_once, end))
                source = kind.places.take(ordered[some], axis=0)
                source += nth[some, None]
                rows[target[some]] = grouped.take(source)

    _run(threads, fill, range(len(dealt)))
    return row_documents


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
    return [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]


def _places(bins: Bins, size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in `grouped` the documents for each place begin, class after class, int64[sum of sizes]."""
    # places of one length come one after the other, `count` documents for each
    by_length = np.argsort(bins.length, kind="stable")
    taken = (bins.count[bins.owner] * bins.times)[by_length]
    begin = np.empty(len(by_length), np.int64)
    begin[by_length] = _starts(taken)[:-1]
    by_class = np.argsort(bins.owner, kind="stable")
    times = bins.times[by_class]
    place = np.repeat(begin[by_class], times)
    place += (np.arange(len(place)) - np.repeat(_starts(times)[:-1], times)) * np.repeat(bins.count, size)
    return place


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Neighbouring classes whose bins hold equally many documents, N of them: classes `first` to `end`, in several
    random orders each."""

    first: int
    end: int
    places: NDArray[np.int64]  # [orders of the first class, then of the next, N]


def _orders(bins: Bins, size: NDArray[np.int64], seed: int) -> tuple[int, NDArray[np.int64], list[_Kind]]:
    """The places of each class in several random orders, which its bins take in turn.

    A class with few bins has an order for each of them. Where there are more, bins share orders: not the documents in
    them, only in which order their lengths come. Returns how many orders a class has, at most and where it has as many
    bins, a power of two; where among those of its kind the orders of a class begin, int64[C]; and the kinds.
    """
    places, start = _places(bins, size), _starts(size)
    most = _FEWEST_ORDERS
    while most < _MOST_ORDERS and 2 * most * len(places) <= _ORDERED_PLACES:
        most *= 2
    orders = np.minimum(bins.count, most)
    first_order = np.empty(len(size), np.int64)
    random = _random(seed, _INSIDE_ROWS)
    kinds = []
    for first, end in pairwise(_runs(size)):
        of_kind = places[start[first] : start[end]].reshape(end - first, -1)
        ordered = np.repeat(of_kind, orders[first:end], axis=0)
        random.permuted(ordered, axis=1, out=ordered)
        first_order[first:end] = _starts(orders[first:end])[:-1]
        kinds.append(_Kind(first=first, end=end, places=ordered))
    return most, first_order, kinds


def _cut(borders: NDArray[np.int64], size: int) -> list[int]:
    """Indices into ascending `borders`, from 0 to the last, that are at least `size` apart where one step is not."""
    cuts = [0]
    while cuts[-1] < len(borders) - 1:
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(borders, borders[cuts[-1]] + size, side="right")) - 1))
    return cuts


def _run(threads: Executor, work: Callable[[int], None], pieces: Iterable[int]) -> None:
    """Do pieces of work on all threads. Raises what the first of them raised that failed."""
    for _ in threads.map(work, pieces):
        pass
