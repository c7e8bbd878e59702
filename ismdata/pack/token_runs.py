"""Runs of tokens: many short arrays stored end to end and addressed by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.arrays import IntArray


class RunTable:
    """Token runs stored end to end, numbered in the order in which they were added."""

    def __init__(self) -> None:
        self._pools: list[NDArray[np.int32]] = []
        self._lengths: list[IntArray] = []
        self._shared: dict[tuple[int, ...], int] = {}
        self._count = 0

    def add(self, tokens: NDArray[np.int32], lengths: IntArray) -> IntArray:
        """Add the runs that `tokens` holds end to end; return their numbers."""
        numbers = np.arange(self._count, self._count + len(lengths))
        self._pools.append(tokens)
        self._lengths.append(lengths)
        self._count += len(lengths)
        return numbers

    def share(self, ids: tuple[int, ...]) -> int:
        """Return the number of a run that is stored once, however often it is shared."""
        if ids not in self._shared:
            self._shared[ids] = int(self.add(np.array(ids, np.int32), np.array([len(ids)], np.int64))[0])
        return self._shared[ids]

    def __len__(self) -> int:
        return self._count

    def lengths(self) -> IntArray:
        """Return the number of tokens in each run, int64[runs]."""
        self._lengths = _merged(self._lengths, np.int64)
        return self._lengths[0]

    def tokens(self) -> NDArray[np.int32]:
        """Return the tokens of all runs, end to end."""
        self._pools = _merged(self._pools, np.int32)
        return self._pools[0]


def _merged(parts: list[NDArray[Any]], dtype: type) -> list[NDArray[Any]]:
    """The parts as a list of one array; copies only if there are several."""
    return parts if len(parts) == 1 else [np.concatenate([np.empty(0, dtype), *parts])]


class BatchRuns:
    """The token runs of a batch: runs shared by the corpus, numbered 0, 1, …, and its own, numbered -1, -2, …"""

    def __init__(self, shared: RunTable) -> None:
        self._shared = shared
        self._own = RunTable()
        self._joined = as_runs(np.empty(0, np.int32), np.empty(0, np.int64))
        self._joined_counts = (0, 0)

    def add(self, tokens: NDArray[np.int32], lengths: IntArray) -> IntArray:
        """Add runs of this batch, stored end to end in `tokens`; return their (negative) numbers."""
        return -1 - self._own.add(tokens, lengths)

    def lengths_of(self, numbers: IntArray) -> IntArray:
        """Return the number of tokens in each of these runs."""
        shared, own = (np.append(table.lengths(), 0) for table in (self._shared, self._own))  # -1 is a valid index
        return np.where(numbers >= 0, shared[np.maximum(numbers, -1)], own[np.maximum(-1 - numbers, -1)])

    def tokens_of(self, numbers: IntArray) -> NDArray[np.int32]:
        """Return the tokens of these runs, end to end."""
        counts = len(self._shared), len(self._own)
        if self._joined_counts != counts:
            tokens = np.concatenate([self._shared.tokens(), self._own.tokens()])
            self._joined = as_runs(tokens, np.concatenate([self._shared.lengths(), self._own.lengths()]))
            self._joined_counts = counts
        return take_runs(self._joined, np.where(numbers < 0, counts[0] - 1 - numbers, numbers))


def as_runs(tokens: NDArray[np.int32], lengths: IntArray) -> pa.LargeBinaryArray:
    """Wrap runs that are stored end to end, for `take_runs`, without copying them."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths * tokens.itemsize, out=offsets[1:])
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(tokens))]
    )


def take_runs(runs: pa.LargeBinaryArray, numbers: IntArray) -> NDArray[np.int32]:
    """Concatenate the runs of these numbers; the result is read-only.

    Arrow copies run by run. Indexing token by token takes several times as long.

    Example:
        >>> runs = as_runs(np.array([7, 8, 9], np.int32), np.array([1, 2]))
        >>> take_runs(runs, np.array([1, 0, 1])).tolist()
        [8, 9, 7, 8, 9]
    """
    data = runs.take(pa.array(numbers)).buffers()[2]
    return np.frombuffer(data, np.int32) if data is not None and data.size else np.empty(0, np.int32)
