"""Column generation for the cutting-stock problem, for sequences that hold only a few documents.

A pattern says how many documents of each size a bin holds. The linear relaxation (Gilmore and Gomory, "A linear
programming approach to the cutting-stock problem", 1961) may use patterns fractionally. Its dual solution prices each
size. A knapsack finds patterns that are worth more than a bin at these prices; they are added, and the relaxation is
solved again. When there are none, the relaxation is optimal, and its value is a lower bound on the number of bins.

Then bins are fixed, a share of all bins at a time: first the whole uses of patterns, then those with the largest
fractions. After each share the relaxation is solved for the remaining documents, so that the rest still fits together
well. Prices are integers, so the bound is exact.

Shape legend: T = seq_len, K sizes, N patterns, C capacity of a bin in units of size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.pack.planning.best_fit import NO_BINS, Bins, Pattern, best_fit_decreasing, fewest_bins, with_patterns

IntArray = NDArray[np.int64]

#: Limit of sizes x capacity, the cells of the knapsack. Lengths are rounded up to larger units until it holds.
_MOST_CELLS = 1 << 21

#: Rounds of adding patterns, at first and after each share of fixed bins; and the most patterns added per round.
ROUNDS, _ROUNDS_AGAIN = 300, 30
_ADDED_PER_ROUND = 120

#: 1 / _FIXED_SHARE of all bins are fixed before the relaxation is solved again.
_FIXED_SHARE = 10

#: Variants of the simplex algorithm, as HiGHS numbers them.
_DUAL, _PRIMAL = 1, 4

#: The price of a bin, as prices are integers. Relative differences below the tolerance come from the solver.
_WORTH = 1 << 30
_TOLERANCE = 1e-6


def column_generation(histogram: IntArray, seq_len: int) -> Bins:
    """Find bins near the optimum of the linear relaxation, never more than best-fit decreasing needs for the sizes.

    Sizes are lengths; only if there are very many and sequences are long, lengths are rounded up to sizes.

    Args:
        histogram: int64[T + 1], documents per length.
        seq_len: T.

    Returns:
        The bins.
    """
    bound = fewest_bins(histogram, seq_len)
    unit = 1
    while np.count_nonzero(_sizes(histogram, unit)) * (seq_len // unit) > _MOST_CELLS:
        unit *= 2
    bins = _dive(_sizes(histogram, unit), bound)
    return bins if unit == 1 else _with_lengths(bins, histogram, unit)


def _size(length: IntArray, seq_len: int, unit: int) -> IntArray:
    """Lengths in units, rounded up. A length beyond the last whole unit of a sequence needs a bin of its own anyway."""
    return np.minimum(-(-length // unit), seq_len // unit)


def _sizes(histogram: IntArray, unit: int) -> IntArray:
    """Documents of each size, int64[C + 1]."""
    seq_len = len(histogram) - 1
    sizes = np.zeros(seq_len // unit + 1, np.int64)
    np.add.at(sizes, _size(np.arange(seq_len + 1), seq_len, unit), histogram)
    return sizes


def _with_lengths(bins: Bins, histogram: IntArray, unit: int) -> Bins:
    """Turn bins of sizes into bins of lengths: the places for a size take its lengths, the longest first.

    A class is divided if its bins come to hold different lengths.
    """
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


class NotSolved(Exception):
    """The solver found no optimal solution."""


class Relaxation:
    """The linear relaxation over the patterns known so far: use them so that bins are fewest and all documents fit.

    A place for a longer document may hold a shorter one. This changes no optimum, and makes prices increase with size.

    Args:
        histogram: int64[C + 1], documents per size.
        known: Bins for these documents; their patterns are the first.
    """

    def __init__(self, histogram: IntArray, known: Bins) -> None:
        from highspy import Highs

        self.size, self.capacity = np.flatnonzero(histogram), len(histogram) - 1
        self._kinds: list[IntArray] = []
        self._times: list[IntArray] = []
        self._solver: Any = Highs()  # type: ignore[no-untyped-call]
        # One thread and the simplex algorithm, so that the result is the same on all machines.
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
        """Add patterns. times: int64[N, K], documents of each size."""
        pattern, kind = np.nonzero(times)
        counts = np.bincount(pattern, minlength=len(times))
        self._add_columns(1.0, kind.astype(np.int32), times[pattern, kind].astype(float), counts)
        cuts = np.cumsum(counts)[:-1]
        self._kinds += np.split(kind, cuts)
        self._times += np.split(times[pattern, kind], cuts)

    def _add_columns(
        self, cost: float, kinds: NDArray[np.int32], values: NDArray[np.float64], counts: IntArray
    ) -> None:
        """Add columns to the linear program; column n has `counts[n]` entries."""
        many = len(counts)
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        self._solver.addCols(
            many, np.full(many, cost), np.zeros(many), np.full(many, np.inf), len(kinds), starts, kinds, values
        )

    def pattern(self, number: int) -> tuple[IntArray, IntArray]:
        """Return the sizes (their indices) in a pattern, and the number of documents of each."""
        return self._kinds[number], self._times[number]

    def restrict(self, stock: IntArray) -> None:
        """Reduce the stock, int64[K], documents per size; patterns that it cannot fill are excluded."""
        for row, documents in enumerate(stock.tolist()):
            self._solver.changeRowBounds(row, documents, np.inf)
        starts = np.cumsum([0, *map(len, self._kinds[:-1])])
        enough = np.logical_and.reduceat(stock[np.concatenate(self._kinds)] >= np.concatenate(self._times), starts)
        columns = np.arange(len(enough), dtype=np.int32) + len(stock) - 1
        self._solver.changeColsBounds(len(columns), columns, np.zeros(len(columns)), np.where(enough, np.inf, 0.0))
        self._solver.setOptionValue("simplex_strategy", _DUAL)  # new bounds keep the last solution dual feasible

    def _primal(self) -> None:
        """Use the primal simplex next: new patterns keep the last solution primal feasible."""
        self._solver.setOptionValue("simplex_strategy", _PRIMAL)

    def solve(self) -> tuple[NDArray[np.float64], IntArray]:
        """Return how often each pattern is used, float64[N], and the price of each size, int64[K]; a bin costs _WORTH.

        Raises NotSolved.
        """
        from highspy import HighsModelStatus

        self._solver.run()
        self._primal()
        if self._solver.getModelStatus() != HighsModelStatus.kOptimal:
            raise NotSolved
        solution = self._solver.getSolution()
        uses = np.array(solution.col_value)[len(self.size) - 1 :]
        prices = np.rint(np.maximum(0, solution.row_dual) * _WORTH).astype(np.int64)
        return uses, prices


def relax(relaxation: Relaxation, stock: IntArray, *, target: int, rounds: int) -> tuple[NDArray[np.float64], int]:
    """Solve the relaxation, adding patterns until it is optimal.

    Args:
        relaxation: The relaxation.
        stock: int64[K], documents of each size.
        target: Stop when the solution has at most this many bins.
        rounds: The most rounds of adding patterns.

    Returns:
        How often each pattern is used, float64[N], and a number of bins that no plan for the stock can go below.

    Raises:
        NotSolved: If the solver fails.
    """
    bound = 0
    for _ in range(rounds):
        uses, prices = relaxation.solve()
        if uses.sum() <= target + _TOLERANCE:
            break
        worth, patterns = _worthwhile(relaxation.size, stock, prices, relaxation.capacity)
        bound = max(bound, -(-int((prices * stock).sum()) // worth))
        if not len(patterns) or uses.sum() <= bound + _TOLERANCE:
            break
        relaxation.add(patterns)
    return uses, bound


def _worthwhile(size: IntArray, stock: IntArray, prices: IntArray, capacity: int) -> tuple[int, IntArray]:
    """Solve the knapsack: the most that the documents of one bin can be worth, and patterns worth more than a bin.

    The patterns, int64[N, K], are the best ones that contain a given size. The stock suffices for each of them.
    """
    # Parcels of 1, 2, 4, … documents of a size, each taken or not, make any number of documents.
    most = np.minimum(stock, capacity // size)
    parcels = [(kind, 1 << power) for kind in np.flatnonzero(most) for power in range(int(most[kind]).bit_length())]
    last = {kind: n for n, (kind, _) in enumerate(parcels)}
    for kind, n in last.items():
        parcels[n] = (kind, int(most[kind]) - parcels[n][1] + 1)
    kinds, times = np.array(parcels).T
    sizes, worths = size[kinds] * times, prices[kinds] * times
    best = np.zeros(capacity + 1, np.int64)  # the most worth that fits into each room
    taken = np.zeros((len(parcels), capacity + 1), bool)
    for parcel, (room, worth) in enumerate(zip(sizes.tolist(), worths.tolist(), strict=True)):
        with_parcel = best[: capacity + 1 - room] + worth
        np.greater(with_parcel, best[room:], out=taken[parcel, room:])
        np.maximum(with_parcel, best[room:], out=best[room:])
    holding = prices + best[capacity - size]
    chosen = np.argsort(-holding, kind="stable")[:_ADDED_PER_ROUND]
    chosen = chosen[holding[chosen] > _WORTH * (1 + _TOLERANCE)]
    smaller = capacity - np.arange(0, capacity // 10, max(1, capacity // 100))
    patterns = np.zeros((len(chosen) + len(smaller), len(size)), np.int64)
    patterns[np.arange(len(chosen)), chosen] = 1
    rooms = np.concatenate([capacity - size[chosen], smaller])
    for parcel in range(len(parcels) - 1, -1, -1):
        found = taken[parcel, rooms]
        patterns[found, kinds[parcel]] += times[parcel]
        rooms -= found * sizes[parcel]
    # A pattern that must contain a size may contain one document more of it than there are.
    good = (patterns <= stock).all(1) & ((patterns * prices).sum(1) > _WORTH * (1 + _TOLERANCE))
    return int(best[capacity]), np.unique(patterns[good], axis=0)


def _dive(histogram: IntArray, bound: int) -> Bins:
    """Solve the relaxation and fix some bins, then repeat for the remaining documents.

    Each time the rest is also packed best-fit, and the shortest of these plans is returned. bound: a number of bins
    that no plan can go below.
    """
    capacity = len(histogram) - 1
    rest = best_fit_decreasing(histogram, capacity)
    relaxation = Relaxation(histogram, rest)
    size, left = relaxation.size, histogram.copy()
    stock = left[size]
    best, kept, best_rows = rest, 0, rest.rows
    patterns: list[Pattern] = []
    rows = 0
    while best_rows > bound and stock.any():
        least = max(-(-int((stock * size).sum()) // capacity), bound - rows)
        try:
            uses, relaxed = relax(relaxation, stock, target=least, rounds=_ROUNDS_AGAIN if rows else ROUNDS)
        except NotSolved:
            break  # numerical trouble: use the best plan found so far
        if not rows:
            bound = max(bound, relaxed)
        fixed, stock = _fix(relaxation, uses, stock)
        patterns += fixed
        rows += sum(bins for _, _, bins in fixed)
        left[size] = stock
        rest = best_fit_decreasing(left, capacity)
        if rows + rest.rows < best_rows:
            best, kept, best_rows = rest, len(patterns), rows + rest.rows
        relaxation.restrict(stock)
    return with_patterns(best, patterns[:kept])


def _fix(relaxation: Relaxation, uses: NDArray[np.float64], stock: IntArray) -> tuple[list[Pattern], IntArray]:
    """Bins to keep, at least one, and the remaining stock.

    Whole uses of patterns come first, then the largest fractions, up to a share of all bins.
    """
    stock = stock.copy()
    fixed: list[Pattern] = []

    def take(number: int, most: int) -> int:
        kinds, times = relaxation.pattern(number)
        bins = min(most, int((stock[kinds] // times).min()))
        if bins:
            stock[kinds] -= times * bins
            fixed.append((relaxation.size[kinds], times, bins))
        return bins

    whole = np.floor(uses + _TOLERANCE).astype(np.int64)
    rows = sum(take(number, int(whole[number])) for number in np.flatnonzero(whole).tolist())
    fractions = uses - whole
    for number in np.argsort(-fractions, kind="stable").tolist():
        if fixed and (rows * _FIXED_SHARE >= uses.sum() or fractions[number] <= _TOLERANCE):
            break
        rows += take(number, 1)
    return fixed, stock
