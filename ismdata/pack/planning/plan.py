"""Document lengths to a plan: which documents share a sequence, in which order. It sees nothing but integers.

The bins are found over the histogram of lengths (choose.py); here documents are laid into them. All documents of one
length are brought together and shuffled, and each place for that length in a bin takes the next of them. The sequences
are shuffled, and the documents inside each. So neither lengths nor the order of the corpus shape the order of training.

Work is cut into pieces that stay in a processor's cache, and pieces run on all cores. What a piece does depends on its
number and the seed, never on which thread does it, nor on how many there are.

>>> plan([5, 3, 2, 6], seq_len=8, seed=0).row_documents.tolist()
[2, 2]

Shape legend: D documents, R rows (sequences), T = seq_len, C classes of bins, E entries of classes (best_fit.py).
"""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from ismdata.arrays import offsets_of
from ismdata.concurrency import run_pieces
from ismdata.errors import UsageError
from ismdata.memory import keep_freed_blocks
from ismdata.pack.planning.best_fit import Bins
from ismdata.pack.planning.choose import best_bins
from ismdata.pack.planning.counting_sort import sort_by_key

#: Documents of a piece of work. Smaller pieces spend their time in calls, larger ones wait for memory.
_PIECE = 1 << 17

#: Lengths that are counted together for each count that is kept of them, and how many at most.
_LENGTHS_PER_COUNT = 8
_LARGEST_PIECE = 1 << 22

#: Documents, neighbours in the corpus, that are dealt to a piece at a time: they fill a few lines of a cache.
_DEALT_TOGETHER = 64

#: Documents that are laid into their rows at a time.
_LAID_AT_ONCE = 1 << 15

#: Rows that are laid down at a time, up to twice as many.
_ROWS_OF_A_PART = 1 << 18

#: Bins of a class that go to the same part of the training order: their documents fill a few lines of a cache.
_BINS_DEALT_TOGETHER = 32

#: Orders of its documents that one class of bins has, where it has as many bins, and places that all these may take.
#: Powers of two.
_FEWEST_ORDERS, _MOST_ORDERS = 4, 64
_ORDERED_PLACES = 1 << 20

#: What random numbers are drawn for. Each has its own stream for a seed.
_OF_DOCUMENTS, _OF_LENGTHS, _OF_ROWS, _INSIDE_PARTS, _INSIDE_ROWS = range(5)


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
        return offsets_of(self.row_documents)


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
    keep_freed_blocks()
    with ThreadPoolExecutor(_threads()) as threads:
        pieces = _Pieces.of(len(lengths), seq_len, seed)
        order = np.empty(len(lengths), np.uint32)
        before = _sort_pieces(lengths, order, seq_len, pieces, threads)
        grouped = _merge_pieces(order, before, pieces, seed, threads)
        bins = best_bins(before[-1].astype(np.int64), seq_len)
        return Plan(order=order, row_documents=_lay_down(grouped, bins, order, seed, threads))


def _threads() -> int:
    """More than so many threads wait for memory, not for a core."""
    return min(os.cpu_count() or 1, 16)


def _random(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=stream)))


def _piece(documents: int, seq_len: int) -> int:
    """How many lengths are counted at a time: so many that the counts of all pieces stay small beside the lengths."""
    return min(documents, max(_PIECE, min(_LENGTHS_PER_COUNT * (seq_len + 1), _LARGEST_PIECE)))


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Documents dealt out to pieces in turn, neighbours in the corpus a few at a time: a piece is an even sample of the
    corpus.

    `places` is an order for the places of a piece, one for all, twice in a row. Each piece begins somewhere else in it,
    for documents of two pieces may be neighbours too; what a shorter piece lacks is left out.
    """

    documents: int
    sizes: NDArray[np.int64]  # [pieces] how many documents a piece has, the first the most
    begins: NDArray[np.int64]  # [pieces] where in the order it begins
    places: NDArray[np.int64]  # [2 · the most documents of a piece]
    first: NDArray[np.uint32]  # the documents of the first piece in that order, twice as well

    @staticmethod
    def of(documents: int, seq_len: int, seed: int) -> _Pieces:
        count = -(-documents // _piece(documents, seq_len))
        turns, left = divmod(documents, count * _DEALT_TOGETHER)
        last = np.clip(left - np.arange(count) * _DEALT_TOGETHER, 0, _DEALT_TOGETHER)
        sizes = turns * _DEALT_TOGETHER + last
        random = _random(seed, _OF_DOCUMENTS)
        places = np.tile(random.permutation(sizes[0]), 2)
        begins = random.integers(0, sizes[0], size=count)
        turn, place = np.divmod(places, _DEALT_TOGETHER)
        first = (turn * (count * _DEALT_TOGETHER) + place).astype(np.uint32)
        return _Pieces(documents=documents, sizes=sizes, begins=begins, places=places, first=first)

    def take(self, number: int, what: NDArray[Any]) -> NDArray[Any]:
        """What the documents of a piece have, in the order of the corpus. what: that of all documents."""
        taken = np.empty(self.sizes[number], what.dtype)
        together, turn = _DEALT_TOGETHER, len(self.sizes) * _DEALT_TOGETHER
        start, turns = number * together, self.documents // turn
        complete = what[: turns * turn].reshape(turns, turn)
        taken[: turns * together].reshape(turns, together)[:] = complete[:, start : start + together]
        last = what[turns * turn :]
        taken[turns * together :] = last[start : start + together]
        return taken

    def shuffled(self, number: int, what: NDArray[Any]) -> NDArray[Any]:
        """What the documents of a piece have, in their random order. what: that of all documents of the piece."""
        return what.take(self._of_piece(number, self.places))

    def documents_of(self, number: int) -> NDArray[np.uint32]:
        """The documents of a piece in their random order."""
        documents: NDArray[np.uint32] = self._of_piece(number, self.first) + np.uint32(number * _DEALT_TOGETHER)
        return documents

    def _of_piece(self, number: int, what: NDArray[Any]) -> NDArray[Any]:
        begin, end = self.begins[number], self.begins[number] + self.sizes[0]
        size, of_first = self.sizes[number], what[begin:end]
        return of_first if size == len(of_first) else of_first[self.places[begin:end] < size]


def _out_of_range(lengths: NDArray[Any], seq_len: int) -> UsageError:
    """Names the first length that is."""
    bad = int(np.flatnonzero((lengths < 1) | (lengths > seq_len))[0])
    return UsageError(
        f"document {bad} has {lengths[bad]} tokens; expected 1 to seq_len = {seq_len}. "
        "Split or drop over-long documents first"
    )


def _sort_pieces(
    lengths: NDArray[Any], by_length: NDArray[np.uint32], seq_len: int, pieces: _Pieces, threads: Executor
) -> NDArray[np.uint32]:
    """Fill `by_length`, uint32[D], with documents, piece after piece, those of a piece by length, and those of one
    length in a random order.

    Returns how many documents of each length come before those of each piece, uint32[pieces + 1, T + 1]; the last row
    is how many there are. Raises UsageError for a length out of range.
    """
    before = np.zeros((len(pieces.sizes) + 1, seq_len + 1), np.uint32)
    starts = offsets_of(pieces.sizes)

    def sort(number: int) -> None:
        own = pieces.take(number, lengths)
        if own.min() < 1 or own.max() > seq_len:
            raise _out_of_range(lengths, seq_len)
        key = pieces.shuffled(number, own.astype(np.int32, copy=False))
        own_by_length = by_length[starts[number] : starts[number + 1]]
        before[number + 1], own_by_length[:] = sort_by_key(key, pieces.documents_of(number), keys=seq_len + 1)

    run_pieces(sort, len(pieces.sizes), executor=threads, threads=_threads())
    for earlier, own in pairwise(before):
        own += earlier
    return before


def _merge_pieces(
    by_length: NDArray[np.uint32], before: NDArray[np.uint32], pieces: _Pieces, seed: int, threads: Executor
) -> NDArray[np.uint32]:
    """All documents by length, uint32[D], those of one length piece after piece, from another piece on for each length:
    so those of one piece, which may be neighbours in the corpus, lie elsewhere for each. The arguments are as
    `_sort_pieces` leaves them.
    """
    merged = np.empty(pieces.documents, np.uint32)
    starts = offsets_of(pieces.sizes)
    total = before[-1]
    first = _random(seed, _OF_LENGTHS).integers(0, len(pieces.sizes), size=len(total))  # the piece each begins with
    begins = offsets_of(total)[:-1] - before[first, np.arange(len(total))]
    inside = np.arange(pieces.sizes[0])

    def merge(number: int) -> None:
        count = before[number + 1] - before[number]
        # where a length goes on in `merged`, less where it begins in this piece
        shift = begins + before[number]
        shift += np.where(number < first, total, 0)
        shift -= offsets_of(count)[:-1]
        places = np.repeat(shift, count)
        places += inside[: len(places)]
        merged[places] = by_length[starts[number] : starts[number + 1]]

    run_pieces(merge, len(pieces.sizes), executor=threads, threads=_threads())
    return merged


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Bins dealt out to parts of the training order, some of a class at a time, each time to a part at random."""

    owner: NDArray[np.int64]  # [deals] the class, part after part, and in a part in the order of classes
    first: NDArray[np.int64]  # [deals] which bin of the class comes first
    bins: NDArray[np.int64]  # [deals] how many go together
    starts: NDArray[np.int64]  # [parts + 1] where the deals of each part begin

    @staticmethod
    def of(count: NDArray[np.int64], seed: int) -> _Parts:
        """count: int64[C], how many bins there are of each class."""
        most = max(1, int(count.sum()) // _ROWS_OF_A_PART)
        parts = 1 << (most.bit_length() - 1)  # a power of two, as cores are: none is left without work at the end
        deals = -(-count // _BINS_DEALT_TOGETHER)
        owner = np.repeat(np.arange(len(count)), deals)
        first = (np.arange(len(owner)) - offsets_of(deals)[owner]) * _BINS_DEALT_TOGETHER
        part = _random(seed, _OF_ROWS).integers(0, parts, size=len(owner))
        by_part = np.argsort(part, kind="stable")
        owner, first = owner[by_part], first[by_part]
        return _Parts(
            owner=owner,
            first=first,
            bins=np.minimum(count[owner] - first, _BINS_DEALT_TOGETHER),
            starts=offsets_of(np.bincount(part, minlength=parts)),
        )


def _lay_down(
    grouped: NDArray[np.uint32], bins: Bins, order: NDArray[np.uint32], seed: int, threads: Executor
) -> NDArray[np.int32]:
    """Fill the bins with the documents of `grouped`, and put them down in a random order: in `order`, uint32[D].

    A place in class c is where in `grouped` the documents for it begin, `count[c]` of them: bin n of the class takes
    the n-th one. Returns how many documents each row has, int32[R].
    """
    bins = _by_size(bins)
    size = _sizes(bins)
    most, first_order, kinds = _orders(bins, size, seed)
    rows_of = [_neighbours(order, kind.places.shape[1]) for kind in kinds]
    parts = _Parts.of(bins.count, seed)
    first_row = offsets_of(parts.bins)[parts.starts]
    first_document = offsets_of(parts.bins * size[parts.owner])[parts.starts]
    row_documents = np.empty(bins.rows, np.int32)

    def fill(part: int) -> None:
        # Rows are made class by class, which reads a few places of `grouped` at a time, and put where they belong.
        own = slice(parts.starts[part], parts.starts[part + 1])
        owner, count = parts.owner[own], parts.bins[own]
        starts = offsets_of(count)
        position = _random(seed, _INSIDE_PARTS, part).permutation(starts[-1])
        sizes = row_documents[first_row[part] : first_row[part + 1]]
        sizes[position] = np.repeat(size[owner], count)
        target = offsets_of(sizes).take(position)
        target += first_document[part]
        nth = np.arange(starts[-1])
        nth += np.repeat(parts.first[own] - starts[:-1], count)
        ordered = nth & (most - 1)
        ordered += np.repeat(first_order[owner], count)
        for kind, rows in zip(kinds, rows_of, strict=True):
            begin, end = starts[np.searchsorted(owner, [kind.first, kind.end])].tolist()
            at_once = max(1, _LAID_AT_ONCE // kind.places.shape[1])
            for start in range(begin, end, at_once):
                some = slice(start, min(start + at_once, end))
                source = kind.places.take(ordered[some], axis=0)
                source += nth[some, None]
                rows[target[some]] = grouped.take(source).view(rows.dtype)[:, 0]

    run_pieces(fill, len(parts.starts) - 1, executor=threads, threads=_threads())
    return row_documents


def _neighbours(order: NDArray[np.uint32], count: int) -> NDArray[np.void]:
    """As many neighbours in `order`, wherever they begin, as one item: numpy moves each at once, not number by number,
    in half the time. Item i writes through to order[i : i + count]."""
    item = np.dtype((np.void, count * order.itemsize))
    return as_strided(np.ndarray(1, item, order), shape=(len(order) - count + 1,), strides=order.strides)


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
    begin[by_length] = offsets_of(taken)[:-1]
    by_class = np.argsort(bins.owner, kind="stable")
    times = bins.times[by_class]
    place = np.repeat(begin[by_class], times)
    place += (np.arange(len(place)) - np.repeat(offsets_of(times)[:-1], times)) * np.repeat(bins.count, size)
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
    places, start = _places(bins, size), offsets_of(size)
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
        first_order[first:end] = offsets_of(orders[first:end])[:-1]
        kinds.append(_Kind(first=first, end=end, places=ordered))
    return most, first_order, kinds
