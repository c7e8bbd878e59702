"""Best-fit decreasing on the histogram of lengths, the type of its result, and a lower bound on the number of bins.

A bin is a sequence that documents are to be put into. All planning algorithms decide which lengths share a bin, and how
often; plan.py then assigns documents. Bins that hold the same lengths form one class with a count, so the work grows
with the number of distinct lengths, not with the number of documents.

Shape legend: T = seq_len, C classes of bins, E entries.

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
    """Bins, in classes of identical ones.

    Attributes:
        count: int64[C], number of bins in each class.
        owner: int64[E], the class of each entry.
        length: int64[E], a length that each bin of the class holds.
        times: int64[E], how many documents of that length each bin of the class holds.
    """

    count: NDArray[np.int64]
    owner: NDArray[np.int64]
    length: NDArray[np.int64]
    times: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Number of bins."""
        return int(self.count.sum())


NO_BINS = Bins(**{name: np.zeros(0, np.int64) for name in ("count", "owner", "length", "times")})

#: Lengths, how often a bin holds each, and how many such bins there are.
Pattern = tuple[NDArray[np.int64], NDArray[np.int64], int]


def fewest_bins(histogram: NDArray[np.int64], seq_len: int) -> int:
    """Return the lower bound L2 of Martello and Toth on the number of bins, at least ceil(tokens / T).

    For a threshold a: a bin with a length above T - a has no room for a length of a or more. Lengths above T / 2 need a
    bin each. Lengths from a to T / 2 need more bins if they exceed the room beside lengths of T / 2 to T - a. The bound
    is the largest number of bins over all thresholds.

    Args:
        histogram: int64[T + 1], documents per length.
        seq_len: T.

    Returns:
        A number of bins that no plan can go below.
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
    """Put the longest documents first, each into the fullest bin that has room for it.

    The result is that of the algorithm on single documents, in time that depends on the number of distinct lengths. All
    documents of length L are placed in a few steps: each of the fullest bins, with room r, takes floor(r / L) of them
    before another bin is considered, because each document makes its bin fuller still. A filled class has room
    r mod L < r / 2 left, so it is visited at most log2(T) times.

    Args:
        histogram: int64[T + 1], documents per length.
        seq_len: T.

    Returns:
        The bins.
    """
    if not histogram.any():
        return NO_BINS
    # The content of a class is a linked list, newest entry first. Classes split from the same class share its tail.
    entry_length: list[int] = []
    entry_times: list[int] = []
    entry_before: list[int] = []

    def put(times: int, length: int, before: int) -> int:
        entry_length.append(length)
        entry_times.append(times)
        entry_before.append(before)
        return len(entry_length) - 1

    # Classes are (room, newest entry, bins). Those with room for the current length are on a stack, the fullest on top.
    # The others wait in a table by room. As lengths decrease, they fit again, with less room than all on the stack, so
    # pushing them keeps the stack sorted.
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
                if left:  # fewer than a bin has room for
                    roomy.append((room - left * length, put(left, length, newest), 1))
                    left = 0
    classes = roomy + [class_ for room in sorted(waiting) for class_ in waiting[room]]
    newest_of = np.array([newest for _, newest, _ in classes], np.int64)
    before_of = np.array(entry_before, np.int64)
    # Unroll all lists in parallel, one entry of each per step.
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
    """Append a class of bins for each pattern."""
    entries = [len(length) for length, _, _ in patterns]
    return Bins(
        count=np.concatenate([bins.count, np.array([count for _, _, count in patterns], np.int64)]),
        owner=np.concatenate([bins.owner, np.repeat(np.arange(len(patterns)) + len(bins.count), entries)]),
        length=np.concatenate([bins.length, *(length for length, _, _ in patterns)]),
        times=np.concatenate([bins.times, *(times for _, times, _ in patterns)]),
    )
