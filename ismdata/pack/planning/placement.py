"""Put documents into bins at random, and the bins into a random order of rows.

A place in a class of bins takes documents of one length, `count[c]` of them: bin n of the class takes the n-th.

Shape legend: D documents, R rows (sequences), C classes of bins (best_fit.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.pack.planning.best_fit import Bins
from ismdata.pack.planning.work import DOCUMENTS_IN_ROWS, ROW_ORDER, ROW_SECTIONS, Runner, random_stream

#: Documents that are copied into their rows at a time.
_DOCUMENTS_PER_COPY = 1 << 15

#: A section of the training order has this many rows, or up to twice as many. Each section is shuffled individually.
_SECTION_ROWS = 1 << 18

#: Bins of a class that go to the same section: their documents fill a few cache lines.
_BINS_PER_DEAL = 32

#: Random orders of the documents in a bin, per class (fewer if it has fewer bins); powers of two.
_MIN_ORDERS, _MAX_ORDERS = 4, 64

#: The most places in the orders of all classes together, where more than _MIN_ORDERS are used.
_MAX_ORDERED_PLACES = 1 << 20


def place_documents(
    grouped: NDArray[np.uint32], bins: Bins, order: NDArray[np.uint32], seed: int, run: Runner
) -> NDArray[np.int32]:
    """Put documents into bins and write the rows, in a random order, to `order`.

    Args:
        grouped: uint32[D], documents by length, from `group_by_length`.
        bins: The bins.
        order: uint32[D], the result: the documents of one row after another.
        seed: Seed of the random order.
        run: Runs pieces of work on threads.

    Returns:
        The number of documents in each row, int32[R].
    """
    bins = _sort_by_size(bins)
    size = _sizes(bins)
    most, first_order, groups = _draw_orders(bins, size, seed)
    rows_of = [_windows(order, group.places.shape[1]) for group in groups]
    sections = _Sections.deal(bins.count, seed)
    first_row = offsets_of(sections.bins)[sections.starts]
    first_document = offsets_of(sections.bins * size[sections.owner])[sections.starts]
    row_documents = np.empty(bins.rows, np.int32)

    def fill(section: int) -> None:
        # Rows are made class by class, which reads a few places of `grouped` at a time, and written where they belong.
        own = slice(sections.starts[section], sections.starts[section + 1])
        owner, count = sections.owner[own], sections.bins[own]
        starts = offsets_of(count)
        position = random_stream(seed, ROW_ORDER, section).permutation(starts[-1])
        sizes = row_documents[first_row[section] : first_row[section + 1]]
        sizes[position] = np.repeat(size[owner], count)
        target = offsets_of(sizes).take(position)
        target += first_document[section]
        nth = np.arange(starts[-1])
        nth += np.repeat(sections.first[own] - starts[:-1], count)
        ordered = nth & (most - 1)
        ordered += np.repeat(first_order[owner], count)
        for group, rows in zip(groups, rows_of, strict=True):
            begin, end = starts[np.searchsorted(owner, [group.first, group.end])].tolist()
            at_once = max(1, _DOCUMENTS_PER_COPY // group.places.shape[1])
            for start in range(begin, end, at_once):
                some = slice(start, min(start + at_once, end))
                source = group.places.take(ordered[some], axis=0)
                source += nth[some, None]
                rows[target[some]] = grouped.take(source).view(rows.dtype)[:, 0]

    run(fill, len(sections.starts) - 1)
    return row_documents


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """Bins dealt to sections of the training order: some bins of a class at a time, each time to a random section.

    Attributes:
        owner: int64[deals], the class; the deals of one section after another, those of a section by class.
        first: int64[deals], the first bin of the class.
        bins: int64[deals], number of bins.
        starts: int64[sections + 1], offsets of the sections' deals.
    """

    owner: NDArray[np.int64]
    first: NDArray[np.int64]
    bins: NDArray[np.int64]
    starts: NDArray[np.int64]

    @staticmethod
    def deal(count: NDArray[np.int64], seed: int) -> _Sections:
        """Deal bins to sections. count: int64[C], number of bins in each class."""
        most = max(1, int(count.sum()) // _SECTION_ROWS)
        sections = 1 << (most.bit_length() - 1)  # a power of two, so that no core is idle at the end
        deals = -(-count // _BINS_PER_DEAL)
        owner = np.repeat(np.arange(len(count)), deals)
        first = (np.arange(len(owner)) - offsets_of(deals)[owner]) * _BINS_PER_DEAL
        section = random_stream(seed, ROW_SECTIONS).integers(0, sections, size=len(owner))
        by_section = np.argsort(section, kind="stable")
        owner, first = owner[by_section], first[by_section]
        return _Sections(
            owner=owner,
            first=first,
            bins=np.minimum(count[owner] - first, _BINS_PER_DEAL),
            starts=offsets_of(np.bincount(section, minlength=sections)),
        )


def _windows(order: NDArray[np.uint32], count: int) -> NDArray[np.void]:
    """All windows of `count` neighbours in `order`, each as one item: item i is a view of order[i : i + count].

    numpy then moves a row at a time, not a number at a time, in half the time.
    """
    item = np.dtype((np.void, count * order.itemsize))
    return as_strided(np.ndarray(1, item, order), shape=(len(order) - count + 1,), strides=order.strides)


def _sizes(bins: Bins) -> NDArray[np.int64]:
    """Documents per bin of each class, int64[C]."""
    return np.bincount(bins.owner, weights=bins.times, minlength=len(bins.count)).astype(np.int64)


def _sort_by_size(bins: Bins) -> Bins:
    """The same bins, classes with the fewest documents first, so that rows of one size are written together."""
    by_size = np.argsort(_sizes(bins), kind="stable")
    rank = np.empty(len(by_size), np.int64)
    rank[by_size] = np.arange(len(by_size))
    return Bins(count=bins.count[by_size], owner=rank[bins.owner], length=bins.length, times=bins.times)


def _run_offsets(values: NDArray[np.int64]) -> list[int]:
    """The offsets of runs of equal values, and the total."""
    return [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]


def _places(bins: Bins, size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in `grouped` the documents for each place begin, class after class, int64[sum of sizes]."""
    # The documents of a length are divided among its places: `count` for each.
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
class _SizeGroup:
    """Neighbouring classes whose bins hold the same number of documents, N.

    Attributes:
        first: The first class.
        end: The class after the last.
        places: int64[orders, N], the places of each class in several random orders, class after class.
    """

    first: int
    end: int
    places: NDArray[np.int64]


def _draw_orders(bins: Bins, size: NDArray[np.int64], seed: int) -> tuple[int, NDArray[np.int64], list[_SizeGroup]]:
    """Draw random orders of the places of each class, which its bins use in turn.

    A class with few bins has one order per bin. Otherwise bins share orders: they hold different documents, but their
    lengths follow each other in the same order.

    Returns the most orders of a class, a power of two; where in its group the orders of each class begin, int64[C]; and
    the groups.
    """
    places, start = _places(bins, size), offsets_of(size)
    most = _MIN_ORDERS
    while most < _MAX_ORDERS and 2 * most * len(places) <= _MAX_ORDERED_PLACES:
        most *= 2
    orders = np.minimum(bins.count, most)
    first_order = np.empty(len(size), np.int64)
    random = random_stream(seed, DOCUMENTS_IN_ROWS)
    groups = []
    for first, end in pairwise(_run_offsets(size)):
        of_group = places[start[first] : start[end]].reshape(end - first, -1)
        ordered = np.repeat(of_group, orders[first:end], axis=0)
        random.permuted(ordered, axis=1, out=ordered)
        first_order[first:end] = offsets_of(orders[first:end])[:-1]
        groups.append(_SizeGroup(first=first, end=end, places=ordered))
    return most, first_order, groups
