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

#: Documents of one length that are shuffled at a time, by random keys of 16 bits: more would share too many keys.
_HAND = 1 << 16

#: Rows that are laid down at a time, and how many counts of such parts are kept at most.
_ROWS_OF_A_PART = 1 << 16
_DEALT_COUNTS = 1 << 24

#: Orders of its documents that one class of bins has, where it has as many bins, and places that all these may take.
_FEWEST_ORDERS, _MOST_ORDERS = 4, 64
_ORDERED_PLACES = 1 << 19

#: What random numbers are drawn for. Each has its own stream for a seed.
_OF_DOCUMENTS, _OF_ROWS, _INSIDE_PARTS, _INSIDE_ROWS = range(4)


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
        piece = _piece(len(lengths), seq_len)
        counts = _count(lengths, seq_len, piece, threads)
        histogram = counts.sum(0, dtype=np.int64)
        bins = best_bins(histogram, seq_len)
        grouped = _group(lengths, counts, piece, threads)
        _shuffle_groups(grouped, histogram, seed, threads)
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


def _count(lengths: NDArray[Any], seq_len: int, piece: int, threads: Executor) -> NDArray[np.uint32]:
    """How many documents of each length a piece has, uint32[pieces, T + 1]. Raises UsageError for one out of range."""
    counts = np.zeros((-(-len(lengths) // piece), seq_len + 1), np.uint32)

    def count(number: int) -> None:
        part = lengths[number * piece : (number + 1) * piece]
        for bad in (int(part.argmin()), int(part.argmax())):
            if not 1 <= part[bad] <= seq_len:
                raise UsageError(
                    f"document {number * piece + bad} has {part[bad]} tokens; expected 1 to seq_len = {seq_len}. "
                    "Split or drop over-long documents first"
                )
        counts[number] = np.bincount(part.astype(np.int64), minlength=seq_len + 1)

    _run(threads, count, len(counts))
    return counts


def _group(lengths: NDArray[Any], counts: NDArray[np.uint32], piece: int, threads: Executor) -> NDArray[np.uint32]:
    """Document numbers by length, those of one length as the corpus has them, uint32[D]: a counting sort."""
    grouped = np.empty(len(lengths), np.uint32)
    ends = np.cumsum(counts, axis=0, dtype=np.uint32)
    begins = _starts(ends[-1])[:-1]
    # numpy sorts integers of up to 16 bits by their digits, in a fraction of the time that others take
    narrow = np.min_scalar_type(counts.shape[1] - 1)

    def place(number: int) -> None:
        start = number * piece
        part = lengths[start : start + piece].astype(narrow)
        documents = part.argsort(kind="stable")
        # where a length goes on in `grouped`, less where it begins among the sorted documents of this piece
        shift = begins + ends[number] - np.cumsum(counts[number], dtype=np.int64)
        places = np.repeat(shift, counts[number])
        places += np.arange(len(part))
        grouped[places] = (documents + start).astype(np.uint32)

    _run(threads, place, len(counts))
    return grouped


def _shuffle_groups(grouped: NDArray[np.uint32], histogram: NDArray[np.int64], seed: int, threads: Executor) -> None:
    """Shuffle the documents of each length among themselves, in place.

    A large group is dealt out in turn like cards, and each hand, an even sample of the group, is shuffled in the cache.
    """
    borders = np.unique(_starts(histogram))
    cuts = _cut(borders, _PIECE)

    def shuffle(number: int) -> None:
        bits = _random(seed, _OF_DOCUMENTS, number).bit_generator

        def shuffled(hand: NDArray[np.uint32]) -> NDArray[np.uint32]:
            keys = bits.random_raw(-(-len(hand) // 4)).view(np.uint16)[: len(hand)]
            order: NDArray[np.int64] = keys.argsort(kind="stable")
            return hand[order]

        for start, stop in pairwise(borders[cuts[number] : cuts[number + 1] + 1].tolist()):
            group = grouped[start:stop]
            hands = -(-len(group) // _HAND)
            group[:] = np.concatenate([shuffled(group[hand::hands]) for hand in range(hands)])

    _run(threads, shuffle, len(cuts) - 1)


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
    dealt = _deal(bins, seed, threads)
    size = np.bincount(bins.owner, weights=bins.times, minlength=len(bins.count)).astype(np.int64)
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
        offset = _starts(sizes)
        cuts = _cut(offset, _PIECE)
        for start, stop in pairwise(cuts):
            of = sizes[start:stop]
            laid = np.arange(offset[start], offset[stop])
            source = places[laid + np.repeat(origin[start:stop] - offset[start:stop], of)]
            source += np.repeat(nth[start:stop], of)
            laid += np.repeat(target[start:stop] - offset[start:stop], of)
            order[laid] = grouped[source]

    _run(threads, fill, len(dealt))
    return Plan(order=order, row_documents=row_documents)


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
