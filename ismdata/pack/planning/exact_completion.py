"""Exact completion: fill bins to the last token, with random documents and one to three more that fit exactly.

It beats best-fit decreasing if lengths are similar: that algorithm has no short documents left to close its gaps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ismdata.pack.planning.best_fit import Bins, Pattern, best_fit_decreasing, fewest_bins, with_patterns

#: Stop when bins that could not be filled have left room for 1 / _LOST_SHARE of all tokens.
_LOST_SHARE = 2000

#: Attempts at filling a bin exactly, before it is filled as far as possible.
_DRAWS = 4

#: Use a pattern for at most 1 / _PATTERN_SHARE of the remaining documents at a time.
_PATTERN_SHARE = 1024

#: Lengths to try as the first of three that fill a bin.
_TRIPLES = 64


def exact_completion(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """Fill bins exactly as long as possible, then pack the rest best-fit.

    Drawing documents in proportion to the histogram keeps its shape, so that exact fits are found until few documents
    are left. Each time a quarter of the remaining documents is placed, the rest is also packed best-fit, and the
    shortest of these plans is returned. The search ends early if the bins are no fuller than those of best-fit alone,
    or if too many of them could not be filled. Each pattern is used for a small share of the remaining documents, so
    the number of patterns grows with the logarithm of the corpus.

    Args:
        histogram: int64[T + 1], documents per length.
        seq_len: T.

    Returns:
        The bins.
    """
    rng = np.random.Generator(np.random.PCG64(seq_len))  # not the user's seed: it must not change the number of bins
    stock = histogram.astype(np.int64)
    patterns: list[Pattern] = []
    rows, documents = 0, int(stock.sum())
    length_of = np.arange(seq_len + 1)
    tokens, alone = int(stock @ length_of), 0  # of all documents; the bins of best-fit alone
    best, best_rows, best_patterns, checkpoint = stock, np.iinfo(np.int64).max, 0, documents
    lost = 0
    while documents and lost * _LOST_SHARE <= tokens:
        if documents <= checkpoint:
            checkpoint = documents * 3 // 4
            with_rest = rows + best_fit_decreasing(stock, seq_len).rows
            if with_rest < best_rows:
                best, best_rows, best_patterns = stock.copy(), with_rest, len(patterns)
            alone = alone or with_rest
            no_fuller = rows and (tokens - int(stock @ length_of)) * alone <= tokens * rows
            if no_fuller or rows + fewest_bins(stock, seq_len) >= best_rows:
                break  # these bins are no fuller than best-fit's, or the rest cannot save a bin any more
        pattern = _fill_bin(stock, seq_len, rng)
        length, times = np.unique(pattern, return_counts=True)
        bins = min(int((stock[length] // times).min()), 1 + documents // (len(pattern) * _PATTERN_SHARE))
        stock[length] -= times * bins
        patterns.append((length, times, bins))
        rows += bins
        documents -= len(pattern) * bins
        lost += (seq_len - sum(pattern)) * bins
    else:
        if not documents and rows < best_rows:
            best, best_patterns = stock, len(patterns)
    return with_patterns(best_fit_decreasing(best, seq_len), patterns[:best_patterns])


def _fill_bin(stock: NDArray[np.int64], seq_len: int, rng: np.random.Generator) -> list[int]:
    """Lengths for one bin, at least one. stock: int64[T + 1], remaining documents per length; not changed."""
    present = np.flatnonzero(stock)
    up_to = np.cumsum(stock[present])
    documents = int(up_to[-1])
    mean = float(present @ stock[present]) / documents
    picked: list[int] = []
    stock = stock.copy()
    for attempt in range(_DRAWS):
        draw = rng.choice(documents, size=min(documents, int(seq_len / mean) + 1), replace=False)
        head = present[np.searchsorted(up_to, draw, side="right")]
        # Exact fits are found most often if two or three documents remain to be chosen.
        kept = int(np.searchsorted(np.cumsum(head), seq_len - (2.2 + attempt % 2) * mean, side="right"))
        picked = head[:kept].tolist()
        np.subtract.at(stock, head[:kept], 1)
        room = seq_len - sum(picked)
        end = _exact_end(stock, room, present)
        if end or not room:
            return picked + end
        if attempt < _DRAWS - 1:
            np.add.at(stock, head[:kept], 1)
    while True:  # nothing fits exactly: add the longest length that fits, and try again
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
    """One, two or three lengths in stock that sum to `room`, as few as possible; empty if none were found.

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
    """Two lengths in stock that sum to `room`, as unequal as possible; empty if there are none."""
    half, end = np.searchsorted(present, [-(-room // 2), room])
    longer = present[half:end]
    both = (stock[longer] > 0) & (stock[room - longer] > 0)
    if len(longer) and 2 * longer[0] == room:
        both[0] = stock[longer[0]] > 1
    found = np.flatnonzero(both)
    return [int(longer[found[-1]]), room - int(longer[found[-1]])] if len(found) else []
