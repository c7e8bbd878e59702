"""A stable sort by small integers, in time that grows with what is sorted and nothing else.

>>> counts, values = sort_by_key(np.array([2, 0, 2, 1], np.int32), np.array([5, 6, 7, 8], np.uint32), keys=4)
>>> counts.tolist(), values.tolist()
([1, 1, 2, 0], [6, 8, 5, 7])
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: So few are sorted before scipy is imported.
_FEW = 1 << 16


def sort_by_key(
    key: NDArray[np.int32], values: NDArray[Any], *, keys: int
) -> tuple[NDArray[np.integer[Any]], NDArray[Any]]:
    """Values by their key, those of one key in the order given.

    key: int32[N], each from 0 to keys - 1. values: [N]. Returns how many values each key has, integers[keys], and the
    sorted values, [N].
    """
    if len(key) < _FEW:
        # numpy sorts integers of up to 16 bits by their digits, in a fraction of the time that wider ones take
        by_key = key.astype(np.min_scalar_type(keys - 1)).argsort(kind="stable")
        return np.bincount(key, minlength=keys), values.take(by_key)
    from scipy.sparse import csr_array

    # A sparse matrix with a value in each row, in the column of its key. Stored by columns instead of rows its values
    # are sorted, and scipy does that in one pass that counts and one that moves.
    by_row = csr_array((values, key, np.arange(len(key) + 1, dtype=np.int32)), shape=(len(key), keys))
    by_column = by_row.tocsc()
    return np.diff(by_column.indptr), by_column.data
