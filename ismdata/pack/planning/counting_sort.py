"""A stable counting sort by small integers, in linear time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Fewer values than this are sorted by numpy, without importing scipy.
_FEW = 1 << 16


def sort_by_key(
    key: NDArray[np.int32], values: NDArray[Any], *, keys: int
) -> tuple[NDArray[np.integer[Any]], NDArray[Any]]:
    """Sort values by key, stably.

    Args:
        key: int32[N], from 0 to keys - 1.
        values: [N].
        keys: Number of keys.

    Returns:
        The number of values of each key, integers[keys], and the sorted values, [N].

    Example:
        >>> counts, values = sort_by_key(np.array([2, 0, 2, 1], np.int32), np.array([5, 6, 7, 8], np.uint32), keys=4)
        >>> counts.tolist(), values.tolist()
        ([1, 1, 2, 0], [6, 8, 5, 7])
    """
    if len(key) < _FEW:
        # numpy sorts integers of up to 16 bits by radix, in a fraction of the time it needs for wider ones.
        by_key = key.astype(np.min_scalar_type(keys - 1)).argsort(kind="stable")
        return np.bincount(key, minlength=keys), values.take(by_key)
    from scipy.sparse import csr_array

    # A sparse matrix with one value per row, in the column of its key. Converting it from row to column order sorts the
    # values; scipy does this in one pass that counts and one that moves.
    by_row = csr_array((values, key, np.arange(len(key) + 1, dtype=np.int32)), shape=(len(key), keys))
    by_column = by_row.tocsc()
    return np.diff(by_column.indptr), by_column.data
