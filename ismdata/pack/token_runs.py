"""Runs of tokens end to end: many short arrays in one flat one, by number or by where they start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.arrays import IntArray


class RunTable:
    """Runs of tokens end to end, by number."""

    def __init__(self) -> None:
        self._pools: list[NDArray[np.int32]] = []
        self._lengths: list[IntArray] = []
        self._shared: dict[tuple[int, ...], int] = {}
        self._count = 0

    def add(self, flat: NDArray[np.int32], lengths: IntArray) -> IntArray:
        """Add runs, end to end in `flat`; their numbers."""
        numbers = np.arange(self._count, self._count + len(lengths))
        self._pools.append(flat)
        self._lengths.append(lengths)
        self._count += len(lengths)
        return numbers

    def share(self, ids: tuple[int, ...]) -> int:
        """The number of a run that is kept once."""
        if ids not in self._shared:
            self._shared[ids] = int(self.add(np.array(ids, np.int32), np.array([len(ids)], np.int64))[0])
        return self._shared[ids]

    def __len__(self) -> int:
        return self._count

    def all_lengths(self) -> IntArray:
        """Tokens of every run, int64[runs + 1]: one empty run at the end, so that -1 is a valid number."""
        return np.append(self.lengths(), 0)

    def lengths(self) -> IntArray:
        """Tokens of every run, int64[runs]."""
        self._lengths = _one(self._lengths, np.int64)
        return self._lengths[0]

    def pool(self) -> NDArray[np.int32]:
        """The tokens of all runs."""
        self._pools = _one(self._pools, np.int32)
        return self._pools[0]


def _one(parts: list[NDArray[Any]], dtype: type) -> list[NDArray[Any]]:
    """The parts end to end in a single one: copied only where there are more."""
    return parts if len(parts) == 1 else [np.concatenate([np.empty(0, dtype), *parts])]


def as_runs(pool: NDArray[np.int32], lengths: IntArray) -> pa.LargeBinaryArray:
    """Runs of these lengths, which lie end to end in a pool, for `taken_runs`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths * pool.itemsize, out=offsets[1:])
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(pool))]
    )


def taken_runs(runs: pa.LargeBinaryArray, numbers: IntArray) -> NDArray[np.int32]:
    """The tokens of runs in the order of their numbers; read-only.

    Copied by Arrow, run by run: an index for each token takes several times as long.

    >>> runs = as_runs(np.array([7, 8, 9], np.int32), np.array([1, 2]))
    >>> taken_runs(runs, np.array([1, 0, 1])).tolist()
    [8, 9, 7, 8, 9]
    """
    data = runs.take(pa.array(numbers)).buffers()[2]
    return np.frombuffer(data, np.int32) if data is not None and data.size else np.empty(0, np.int32)
