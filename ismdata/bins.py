"""Histogram of lengths to bins: which lengths share a sequence, and how often. Documents come later (packing.py).

Two plans are made, the one with fewer bins is taken (best-fit at a tie):

- best-fit-decreasing, over the histogram of lengths instead of over the documents. Bins that hold the same lengths are
  one class with a count, so the work grows with the number of distinct lengths and not with the number of documents,
  while the bins are those of the item-by-item algorithm.
- exact completion: documents drawn as the corpus has them, then one, two or three that fill the sequence to the last
  token. It wins where lengths are alike and best-fit, left with nothing short, finds nothing to close its gaps with.

>>> best_bins(np.bincount([5, 3, 2, 6], minlength=9), seq_len=8).rows
2
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Best-fit within this factor of the bound is taken as it is: no other plan can save more.
_GOOD_ENOUGH = 1.0005

#: Exact completion draws this often for one bin before it fills it as well as it can.
_DRAWS = 4

#: A pattern found by exact completion is used for one part in so many of the remaining documents at once.
_PATTERN_SHARE = 1024

#: How many lengths are tried as the first of three that fill a bin.
_TRIPLES = 64


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


def best_bins(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """The plan with fewer sequences of the two; best-fit at a tie. histogram: int64[T + 1], documents per length."""
    best_fit = best_fit_decreasing(histogram, seq_len)
    if best_fit.rows <= fewest_bins(histogram, seq_len) * _GOOD_ENOUGH:
        return best_fit
    exact = exact_completion(histogram, seq_len)
    return exact if exact.rows < best_fit.rows else best_fit


def best_fit_decreasing(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """Longest documents first, each into the fullest bin that still has room for it.

    All bins of one class take the same documents, so a length is laid down in a few steps however many documents have
    it: the fullest bins with room r take floor(r / L) documents of length L each before any other bin is looked at,
    for each documents makes its bin fuller still. A class that is filled leaves room r mod L < r / 2, hence is
    visited at most log2(T) times.
    """
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


def exact_completion(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """Bins filled to the last token, as long as that can be; then whatever is left.

    Drawing documents in proportion to the histogram keeps its shape, so exact ends can be found nearly to the last bin.
    What remains after each quarter of the documents is also packed best-fit, and the shortest of these plans is
    returned. It ends early where the bins made so far are no fuller than those of best-fit alone. A pattern is used for
    a small share of the remaining documents at once: their number grows with the logarithm of the corpus.
    """
    rng = np.random.Generator(np.random.PCG64(seq_len))  # part of the algorithm: no seed may change the number of bins
    stock = histogram.astype(np.int64)
    patterns: list[tuple[NDArray[np.int64], NDArray[np.int64], int]] = []
    rows, documents = 0, int(stock.sum())
    length_of = np.arange(seq_len + 1)
    tokens, alone = int(stock @ length_of), 0  # of all documents, and the bins that best-fit alone takes
    best, best_rows, best_patterns, checkpoint = stock, np.iinfo(np.int64).max, 0, documents
    while documents:
        if documents <= checkpoint:
            checkpoint = documents * 3 // 4
            with_rest = rows + best_fit_decreasing(stock, seq_len).rows
            if with_rest < best_rows:
                best, best_rows, best_patterns = stock.copy(), with_rest, len(patterns)
            alone = alone or with_rest
            no_fuller = rows and (tokens - int(stock @ length_of)) * alone <= tokens * rows
            if no_fuller or rows + fewest_bins(stock, seq_len) >= best_rows:
                break  # bins like these save nothing, or nothing that could still be done would save a bin
        pattern = _fill_bin(stock, seq_len, rng)
        length, times = np.unique(pattern, return_counts=True)
        bins = min(int((stock[length] // times).min()), 1 + documents // (len(pattern) * _PATTERN_SHARE))
        stock[length] -= times * bins
        patterns.append((length, times, bins))
        rows += bins
        documents -= len(pattern) * bins
    else:
        if rows < best_rows:
            best, best_patterns = stock, len(patterns)
    return _with_patterns(best_fit_decreasing(best, seq_len), patterns[:best_patterns])


def _fill_bin(stock: NDArray[np.int64], seq_len: int, rng: np.random.Generator) -> list[int]:
    """Lengths for one bin, at least one, out of the stock (int64[T + 1], documents per length; left as it was)."""
    present = np.flatnonzero(stock)
    up_to = np.cumsum(stock[present])
    documents = int(up_to[-1])
    mean = float(present @ stock[present]) / documents
    picked: list[int] = []
    stock = stock.copy()
    for attempt in range(_DRAWS):
        draw = rng.choice(documents, size=min(documents, int(seq_len / mean) + 1), replace=False)
        head = present[np.searchsorted(up_to, draw, side="right")]
        # The end is found most often where it is two or three documents long.
        kept = int(np.searchsorted(np.cumsum(head), seq_len - (2.2 + attempt % 2) * mean, side="right"))
        picked = head[:kept].tolist()
        np.subtract.at(stock, head[:kept], 1)
        room = seq_len - sum(picked)
        end = _exact_end(stock, room, present)
        if end or not room:
            return picked + end
        if attempt < _DRAWS - 1:
            np.add.at(stock, head[:kept], 1)
    while True:  # nothing fits exactly: the longest that fits, until something does
        fitting = present[: np.searchsorted(present, room, side="right")]
        fitting = fitting[stock[fitting] > 0]
        if not len(fitting):
            return picked
        longest = int(fitting[-1])
        picked.append(longest)
        stock[longest] -= 1
        room -= longest
        end = _exact_end(stock, room, present)
        if end:
            return picked + end


def _exact_end(stock: NDArray[np.int64], room: int, present: NDArray[np.int64]) -> list[int]:
    """One, two or three lengths from the stock that sum to `room`, the fewest first; empty if none were found.

    present: the lengths that may be in stock, ascending.
    """
    if room < len(stock) and stock[room]:
        return [room]
    pair = _exact_pair(stock, room, present)
    if pair:
        return pair
    for third in present[: np.searchsorted(present, room)][::-1][:_TRIPLES].tolist():
        if stock[third]:
            stock[third] -= 1
            pair = _exact_pair(stock, room - third, present)
            stock[third] += 1
            if pair:
                return [third, *pair]
    return []


def _exact_pair(stock: NDArray[np.int64], room: int, present: NDArray[np.int64]) -> list[int]:
    """Two lengths from the stock that sum to `room`, as unequal as can be; empty if there are none."""
    half, end = np.searchsorted(present, [-(-room // 2), room])
    longer = present[half:end]
    both = (stock[longer] > 0) & (stock[room - longer] > 0)
    if len(longer) and 2 * longer[0] == room:
        both[0] = stock[longer[0]] > 1
    found = np.flatnonzero(both)
    return [int(longer[found[-1]]), room - int(longer[found[-1]])] if len(found) else []


def _with_patterns(bins: Bins, patterns: list[tuple[NDArray[np.int64], NDArray[np.int64], int]]) -> Bins:
    """The same bins and, after them, a class for each pattern of lengths, times and number of bins."""
    entries = [len(length) for length, _, _ in patterns]
    return Bins(
        count=np.concatenate([bins.count, np.array([count for _, _, count in patterns], np.int64)]),
        owner=np.concatenate([bins.owner, np.repeat(np.arange(len(patterns)) + len(bins.count), entries)]),
        length=np.concatenate([bins.length, *(length for length, _, _ in patterns)]),
        times=np.concatenate([bins.times, *(times for _, times, _ in patterns)]),
    )
