"""Runs of tokens end to end: many short arrays in one flat one, by number or by where they start."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ismdata.batch import IntArray


class RunTable:
    """Runs of tokens end to end, by number."""

    def __init__(self) -> None:
        self._pools: list[NDArray[np.int32]] = []
        self._lengths: list[IntArray] = []
        self._shared: dict[tuple[int, ...], int] = {}
        self._count = 0
        self.total = 0

    def add(self, flat: NDArray[np.int32], lengths: IntArray) -> IntArray:
        """Add runs, end to end in `flat`; their numbers."""
        numbers = np.arange(self._count, self._count + len(lengths))
        self._pools.append(flat)
        self._lengths.append(lengths)
        self._count += len(lengths)
        self.total += len(flat)
        return numbers

    def share(self, ids: tuple[int, ...]) -> int:
        """The number of a run that is kept once."""
        if ids not in self._shared:
            self._shared[ids] = int(self.add(np.array(ids, np.int32), np.array([len(ids)], np.int64))[0])
        return self._shared[ids]

    def all_lengths(self) -> IntArray:
        """Tokens of every run, int64[runs + 1]: one empty run at the end, so that -1 is a valid number."""
        self._lengths = [np.concatenate([np.empty(0, np.int64), *self._lengths])]
        return np.append(self._lengths[0], 0)

    def pool(self) -> NDArray[np.int32]:
        self._pools = [np.concatenate([np.empty(0, np.int32), *self._pools])]
        return self._pools[0]


def ragged_arange(starts: IntArray, lengths: IntArray) -> IntArray:
    """The ranges [start, start + length), end to end.

    >>> ragged_arange(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    total = int(lengths.sum())
    offsets = np.cumsum(lengths) - lengths
    ranges: IntArray = np.arange(total, dtype=np.int64) + np.repeat(starts - offsets, lengths)
    return ranges
