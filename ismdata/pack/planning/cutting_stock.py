"""Histogram of lengths to bins where a sequence holds few documents: column generation for the cutting-stock problem.

A filling says how many documents of each size one bin takes. The linear relaxation (Gilmore and Gomory, "A linear
programming approach to the cutting-stock problem", 1961) may use a filling any fraction of a time. Its solution has a
price for a document of each size, and the filling that is worth most at these prices, a knapsack, is one to add; when
none is worth more than a bin, the relaxation is solved, and no plan has fewer bins. Then fillings are decided on, whole
uses first and the largest fractions next, a share at a time, and the relaxation is solved again for what is left: bins
that are decided on early leave documents that go together. All prices are integers, so a bound is exact.

Shape legend: T = seq_len, K sizes, N fillings, C capacity of a bin in units of size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.pack.planning.best_fit import NO_BINS, Bins, Pattern, best_fit_decreasing, fewest_bins, with_patterns

IntArray = NDArray[np.int64]

#: Sizes times capacity, at most: lengths are rounded up to larger and larger units until that holds.
_MOST_CELLS = 1 << 21

#: How often fillings are looked for, at first and each time that some are decided on; and how many are added at once.
_ROUNDS, _ROUNDS_AGAIN = 300, 30
_ADDED_AT_ONCE = 120

#: One bin in so many is decided on before the relaxation is solved again.
_DECIDED_SHARE = 10

#: Variants of the simplex algorithm, as HiGHS numbers them.
_DUAL, _PRIMAL = 1, 4

#: What a bin is worth where prices are integers; below this share of it differences are the solver's.
_WORTH = 1 << 30
_TOLERANCE = 1e-6


def column_generation(histogram: IntArray, seq_len: int) -> Bins:
    """Bins near the linear relaxation, never more than best-fit-decreasing of the sizes makes. histogram: int64[T + 1],
    documents per length.

    Lengths are their own sizes; where there are very many and a sequence is long, they are rounded up.
    """
    bound = fewest_bins(histogram, seq_len)
    unit = 1
    while np.count_nonzero(_sizes(histogram, unit)) * (seq_len // unit) > _MOST_CELLS:
        unit *= 2
    bins = _dive(_sizes(histogram, unit), bound)
    return bins if unit == 1 else _with_lengths(bins, histogram, unit)


def relaxed_bound(histogram: IntArray, seq_len: int) -> int:
    """A number of bins that no plan can go below: that of the linear relaxation, rounded up."""
    relaxation = _Relaxation(histogram, best_fit_decreasing(histogram, seq_len))
    return _relax(relaxation, histogram[relaxation.size], target=0, rounds=10 * _ROUNDS)[1]


def _size(length: IntArray, seq_len: int, unit: int) -> IntArray:
    """Of documents, in units, rounded up. What is longer than all units of a sequence has one to itself either way."""
    return np.minimum(-(-length // unit), seq_len // unit)


def _sizes(histogram: IntArray, unit: int) -> IntArray:
    """Documents of each size, int64[C + 1]."""
    seq_len = len(histogram) - 1
    sizes = np.zeros(seq_len // unit + 1, np.int64)
    np.add.at(sizes, _size(np.arange(seq_len + 1), seq_len, unit), histogram)
    return sizes


def _with_lengths(bins: Bins, histogram: IntArray, unit: int) -> Bins:
    """Bins of sizes as bins of lengths: the places for a size take its lengths, the longest first. Classes whose bins
    come to hold other lengths are divided."""
    stock: dict[int, list[list[int]]] = {}
    present = np.flatnonzero(histogram)
    for length, size in zip(present.tolist(), _size(present, len(histogram) - 1, unit).tolist(), strict=True):
        stock.setdefault(size, []).append([length, int(histogram[length])])
    patterns: list[Pattern] = []
    entries_of: list[list[tuple[list[list[int]], int]]] = [[] for _ in bins.count]
    for owner, size, times in zip(bins.owner.tolist(), bins.length.tolist(), bins.times.tolist(), strict=True):
        entries_of[owner].append((stock[size], times))
    for left, entries in zip(bins.count.tolist(), entries_of, strict=True):
        while left:
            alike = max(1, min(left, *(lengths[-1][1] // times for lengths, times in entries)))
            taken: dict[int, int] = {}
            for lengths, times in entries:
                wanted = times * alike
                while wanted:
                    length, there = lengths[-1]
                    used = min(wanted, there)
                    taken[length] = taken.get(length, 0) + used // alike
                    wanted -= used
                    lengths[-1][1] -= used
                    if not lengths[-1][1]:
                        lengths.pop()
            patterns.append((np.array(list(taken)), np.array(list(taken.values())), alike))
            left -= alike
    return with_patterns(NO_BINS, patterns)


class _NotSolved(Exception):
    """The solver gave up."""


class _Relaxation:
    """How often to use each filling known so far, fractions allowed, so that bins are fewest and all documents of the
    stock have a place.

    A place for a longer document may take a shorter one. That changes no optimum, and keeps prices in order.
    histogram: int64[C + 1], documents of each size. known: bins of them, whose fillings are the first.
    """

    def __init__(self, histogram: IntArray, known: Bins) -> None:
        from highspy import Highs

        self.size, self.capacity = np.flatnonzero(histogram), len(histogram) - 1
        self._kinds: list[IntArray] = []
        self._times: list[IntArray] = []
        self._solver: Any = Highs()  # type: ignore[no-untyped-call]
        # One thread, simplex: the same bins wherever it runs.
        for name, value in (("output_flag", False), ("threads", 1), ("parallel", "off"), ("solver", "simplex")):
            self._solver.setOptionValue(name, value)
        self._primal()
        sizes, nothing = len(self.size), np.zeros(0)
        least, most = histogram[self.size].astype(float), np.full(sizes, np.inf)
        self._solver.addRows(sizes, least, most, 0, np.zeros(sizes, np.int32), nothing.astype(np.int32), nothing)
        pairs = np.arange(sizes - 1, dtype=np.int32)
        self._add_columns(
            0.0,
            np.stack([pairs, pairs + 1], axis=1).reshape(-1),
            np.tile([1.0, -1.0], len(pairs)),
            np.full(len(pairs), 2),
        )
        self.add(np.eye(sizes, dtype=np.int64))
        times = np.zeros((len(known.count), sizes), np.int64)
        np.add.at(times, (known.owner, np.searchsorted(self.size, known.length)), known.times)
        self.add(times)

    def add(self, times: IntArray) -> None:
        """More fillings: documents of each kind, int64[N, K]."""
        filling, kind = np.nonzero(times)
        counts = np.bincount(filling, minlength=len(times))
        self._add_columns(1.0, kind.astype(np.int32), times[filling, kind].astype(float), counts)
        cuts = np.cumsum(counts)[:-1]
        self._kinds += np.split(kind, cuts)
        self._times += np.split(times[filling, kind], cuts)

    def _add_columns(
        self, cost: float, kinds: NDArray[np.int32], values: NDArray[np.float64], counts: IntArray
    ) -> None:
        many = len(counts)
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        self._solver.addCols(
            many, np.full(many, cost), np.zeros(many), np.full(many, np.inf), len(kinds), starts, kinds, values
        )

    def filling(self, number: int) -> tuple[IntArray, IntArray]:
        """The kinds of documents in it, and how many of each."""
        return self._kinds[number], self._times[number]

    def restrict(self, stock: IntArray) -> None:
        """Go on with a smaller stock: only fillings that it has the documents for may be used."""
        for row, documents in enumerate(stock.tolist()):
            self._solver.changeRowBounds(row, documents, np.inf)
        starts = np.cumsum([0, *map(len, self._kinds[:-1])])
        there = np.logical_and.reduceat(stock[np.concatenate(self._kinds)] >= np.concatenate(self._times), starts)
        columns = np.arange(len(there), dtype=np.int32) + len(stock) - 1
        self._solver.changeColsBounds(len(columns), columns, np.zeros(len(columns)), np.where(there, np.inf, 0.0))
        self._solver.setOptionValue("simplex_strategy", _DUAL)  # other bounds leave the prices as good as they were

    def _primal(self) -> None:
        """The simplex for the next solution: more fillings leave the last one possible."""
        self._solver.setOptionValue("simplex_strategy", _PRIMAL)

    def solve(self) -> tuple[NDArray[np.float64], IntArray]:
        """How often each filling is used, float64[N], and the prices, int64[K], of which _WORTH make a bin."""
        from highspy import HighsModelStatus

        self._solver.run()
        self._primal()
        if self._solver.getModelStatus() != HighsModelStatus.kOptimal:
            raise _NotSolved
        solution = self._solver.getSolution()
        uses = np.array(solution.col_value)[len(self.size) - 1 :]
        prices = np.rint(np.maximum(0, solution.row_dual) * _WORTH).astype(np.int64)
        return uses, prices


def _relax(relaxation: _Relaxation, stock: IntArray, *, target: int, rounds: int) -> tuple[NDArray[np.float64], int]:
    """Solve the relaxation, adding fillings until it has no more bins than `target`, or as few as can be, or after so
    many rounds. Returns how often fillings are used, and a number of bins that no plan for the stock goes below.
    """
    bound = 0
    for _ in range(rounds):
        uses, prices = relaxation.solve()
        if uses.sum() <= target + _TOLERANCE:
            break
        worth, fillings = _worthwhile(relaxation.size, stock, prices, relaxation.capacity)
        bound = max(bound, -(-int((prices * stock).sum()) // worth))
        if not len(fillings) or uses.sum() <= bound + _TOLERANCE:
            break
        relaxation.add(fillings)
    return uses, bound


def _worthwhile(size: IntArray, stock: IntArray, prices: IntArray, capacity: int) -> tuple[int, IntArray]:
    """What the documents of one bin can be worth, and fillings that are worth more than a bin, int64[N, K]: the best
    ones of those that hold a certain kind. All of them can be taken from the stock.
    """
    # Documents of a kind in parcels of 1, 2, 4 ... make any number of them: each parcel is taken or not.
    most = np.minimum(stock, capacity // size)
    parcels = [(kind, 1 << power) for kind in np.flatnonzero(most) for power in range(int(most[kind]).bit_length())]
    last = {kind: n for n, (kind, _) in enumerate(parcels)}
    for kind, n in last.items():
        parcels[n] = (kind, int(most[kind]) - parcels[n][1] + 1)
    kinds, times = np.array(parcels).T
    sizes, worths = size[kinds] * times, prices[kinds] * times
    best = np.zeros(capacity + 1, np.int64)  # by the room there is
    taken = np.zeros((len(parcels), capacity + 1), bool)
    for parcel, (room, worth) in enumerate(zip(sizes.tolist(), worths.tolist(), strict=True)):
        with_it = best[: capacity + 1 - room] + worth
        np.greater(with_it, best[room:], out=taken[parcel, room:])
        np.maximum(with_it, best[room:], out=best[room:])
    holding = prices + best[capacity - size]
    chosen = np.argsort(-holding, kind="stable")[:_ADDED_AT_ONCE]
    chosen = chosen[holding[chosen] > _WORTH * (1 + _TOLERANCE)]
    smaller = capacity - np.arange(0, capacity // 10, max(1, capacity // 100))
    fillings = np.zeros((len(chosen) + len(smaller), len(size)), np.int64)
    fillings[np.arange(len(chosen)), chosen] = 1
    rooms = np.concatenate([capacity - size[chosen], smaller])
    for parcel in range(len(parcels) - 1, -1, -1):
        found = taken[parcel, rooms]
        fillings[found, kinds[parcel]] += times[parcel]
        rooms -= found * sizes[parcel]
    # One that was to hold a kind may do so once more than there are documents of it.
    good = (fillings <= stock).all(1) & ((fillings * prices).sum(1) > _WORTH * (1 + _TOLERANCE))
    return int(best[capacity]), np.unique(fillings[good], axis=0)


def _dive(histogram: IntArray, bound: int) -> Bins:
    """Solve the relaxation, decide on some bins, and again for what is left; each time the rest is also packed
    best-fit, and the shortest of these plans is returned."""
    capacity = len(histogram) - 1
    rest = best_fit_decreasing(histogram, capacity)
    relaxation = _Relaxation(histogram, rest)
    size, left = relaxation.size, histogram.copy()
    stock = left[size]
    best, kept, best_rows = rest, 0, rest.rows
    patterns: list[Pattern] = []
    rows = 0
    while best_rows > bound and stock.any():
        least = max(-(-int((stock * size).sum()) // capacity), bound - rows)
        try:
            uses, relaxed = _relax(relaxation, stock, target=least, rounds=_ROUNDS_AGAIN if rows else _ROUNDS)
        except _NotSolved:
            break  # numbers that the solver cannot deal with: what was found so far is a plan
        if not rows:
            bound = max(bound, relaxed)
        decided, stock = _decide(relaxation, uses, stock)
        patterns += decided
        rows += sum(bins for _, _, bins in decided)
        left[size] = stock
        rest = best_fit_decreasing(left, capacity)
        if rows + rest.rows < best_rows:
            best, kept, best_rows = rest, len(patterns), rows + rest.rows
        relaxation.restrict(stock)
    return with_patterns(best, patterns[:kept])


def _decide(relaxation: _Relaxation, uses: NDArray[np.float64], stock: IntArray) -> tuple[list[Pattern], IntArray]:
    """Bins to keep, at least one: whole uses, then the largest fractions up to a share of all bins; and what is left of
    the stock."""
    stock = stock.copy()
    decided: list[Pattern] = []

    def take(number: int, most: int) -> int:
        kinds, times = relaxation.filling(number)
        bins = min(most, int((stock[kinds] // times).min()))
        if bins:
            stock[kinds] -= times * bins
            decided.append((relaxation.size[kinds], times, bins))
        return bins

    whole = np.floor(uses + _TOLERANCE).astype(np.int64)
    rows = sum(take(number, int(whole[number])) for number in np.flatnonzero(whole).tolist())
    fractions = uses - whole
    for number in np.argsort(-fractions, kind="stable").tolist():
        if decided and (rows * _DECIDED_SHARE >= uses.sum() or fractions[number] <= _TOLERANCE):
            break
        rows += take(number, 1)
    return decided, stock
