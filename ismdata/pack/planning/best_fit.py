"""Histogram of lengths to bins: which lengths share a sequence, and how often. Documents come later (plan.py).

Here is what a plan is, a number of bins that none goes below, and the plan of best-fit-decreasing. It works on the
histogram of lengths instead of the documents: bins that hold the same lengths are one class with a count, so the work
grows with the number of distinct lengths and not with the number of documents, while the bins are those of the
item-by-item algorithm.

>>> best_fit_decreasing(np.bincount([5, 3, 2, 6], minlength=9), seq_len=8).rows
2
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Classes of identical bins. Class c stands for `count[c]` bins; entry i puts `times[i]` documents of length
    `length[i]` into every bin of class `owner[i]`."""

    count: NDArray[np.int64]  # [C]
    owner: NDArray[np.int64]  # [E]
    length: NDArray[np.int64]  # [E]
    times: NDArray[np.int64]  # [E]

    @property
    def rows(self) -> int:
        return int(self.count.sum())


NO_BINS = Bins(**{name: np.zeros(0, np.int64) for name in ("count", "owner", "length", "times")})

#: Lengths, how often each is in a bin, and how many such bins.
Pattern = tuple[NDArray[np.int64], NDArray[np.int64], int]


def fewest_bins(histogram: NDArray[np.int64], seq_len: int) -> int:
    """A number of bins that no plan can go below: the bound L2 of Martello and Toth, at least ceil(sum / T).

    For a threshold a: lengths above T - a leave no room for any of a or more; those above T / 2 go one to a bin, and of
    those between a and T / 2 only what fits beside them needs no bin of its own. The largest such count over all a
    holds. histogram: int64[T + 1], documents per length.
    """
    length = np.arange(seq_len + 1)
    documents, tokens = np.cumsum(histogram), np.cumsum(histogram * length)
    half = seq_len // 2
    threshold = np.arange(half + 1)
    above_half = documents[seq_len] - documents[half]
    with_room = seq_len - threshold
    beside = (documents[with_room] - documents[half]) * seq_len - (tokens[with_room] - tokens[half])
    small = tokens[half] - tokens[np.maximum(threshold - 1, 0)]
    return int((above_half + np.maximum(0, -((beside - small) // seq_len))).max())


def best_fit_decreasing(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """Longest documents first, each into the fullest bin that still has room for it.

    All bins of one class take the same documents, so a length is laid down in a few steps however many documents have
    it: the fullest bins with room r take floor(r / L) documents of length L each before any other bin is looked at,
    for each documents makes its bin fuller still. A class that is filled leaves room r mod L < r / 2, hence is
    visited at most log2(T) times.
    """
    if not histogram.any():
        return NO_BINS
    # What a class holds is a linked list, newest entry first: bins of one origin share their tail.
    entry_length: list[int] = []
    entry_times: list[int] = []
    entry_before: list[int] = []

    def put(times: int, length: int, before: int) -> int:
        entry_length.append(length)
        entry_times.append(times)
        entry_before.append(before)
        return len(entry_length) - 1

    # Classes are (room, newest entry, bins). Those with room for the present length are on a stack, the fullest on top.
    # The others wait by their room; as the length sinks they come to have room again, and less of it than all on the
    # stack: so the stack stays sorted without being searched.
    roomy: list[tuple[int, int, int]] = []
    waiting: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    above = seq_len
    for length in np.flatnonzero(histogram)[::-1].tolist():
        for room in range(above - 1, length - 1, -1):
            roomy.extend(waiting.pop(room, ()))
        above = length
        left = int(histogram[length])
        while left:
            room, newest, bins = roomy.pop() if roomy else (seq_len, -1, left)
            fits = room // length
            filled = min(bins, left // fits)
            if filled:
                rest = room - fits * length
                waiting[rest].append((rest, put(fits, length, newest), filled))
                left -= filled * fits
            if filled < bins:
                untouched = bins - filled - (left > 0)
                if untouched and newest >= 0:
                    roomy.append((room, newest, untouched))
                if left:  # fewer than one bin takes
                    roomy.append((room - left * length, put(left, length, newest), 1))
                    left = 0
    classes = roomy + [class_ for room in sorted(waiting) for class_ in waiting[room]]
    newest_of = np.array([newest for _, newest, _ in classes], np.int64)
    before_of = np.array(entry_before, np.int64)
    # Unroll all lists side by side, one entry of each a step.
    owners, entries = [], []
    owner = np.arange(len(classes))
    at = newest_of
    while len(at):
        owners.append(owner)
        entries.append(at)
        at = before_of[at]
        owner, at = owner[at >= 0], at[at >= 0]
    entry = np.concatenate(entries)
    return Bins(
        count=np.array([bins for _, _, bins in classes], np.int64),
        owner=np.concatenate(owners),
        length=np.array(entry_length, np.int64)[entry],
        times=np.array(entry_times, np.int64)[entry],
    )


def with_patterns(bins: Bins, patterns: list[Pattern]) -> Bins:
    """The same bins and, after them, a class for each pattern of lengths, times and number of bins."""
    entries = [len(length) for length, _, _ in patterns]
    return Bins(
        count=np.concatenate([bins.count, np.array([count for _, _, count in patterns], np.int64)]),
        owner=np.concatenate([bins.owner, np.repeat(np.arange(len(patterns)) + len(bins.count), entries)]),
        length=np.concatenate([bins.length, *(length for length, _, _ in patterns)]),
        times=np.concatenate([bins.times, *(times for _, times, _ in patterns)]),
    )
