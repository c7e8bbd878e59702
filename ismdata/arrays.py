"""Ragged arrays: many short arrays in one flat array, each with its offset."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def ragged_arange(starts: IntArray, lengths: IntArray) -> IntArray:
    """The ranges [start, start + length), concatenated.

    Args:
        starts: int64[N], where each range starts.
        lengths: int64[N], how long each range is.

    Returns:
        int64[sum of lengths].

    >>> ragged_arange(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    total = int(lengths.sum())
    offsets = np.cumsum(lengths) - lengths
    ranges: IntArray = np.arange(total, dtype=np.int64) + np.repeat(starts - offsets, lengths)
    return ranges


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Exclusive prefix sums: the offsets of N lists in a flat array, and after them the array's length.

    Args:
        lengths: int[N].

    Returns:
        int64[N + 1].

    >>> offsets_of(np.array([2, 0, 1])).tolist()
    [0, 2, 2, 3]
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
