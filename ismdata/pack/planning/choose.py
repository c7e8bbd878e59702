"""Histogram of lengths to the bins to use: plans are made one after the other, and the first that is good enough is
taken, or the one with the fewest bins.

- Best-fit-decreasing (best_fit.py): milliseconds, and most often as good as can be.
- Exact completion (exact_completion.py), where lengths are alike.
- Column generation (cutting_stock.py), where a sequence holds few documents, so that hardly any go together.

>>> best_bins(np.bincount([5, 3, 2, 6], minlength=9), seq_len=8).rows
2
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ismdata.pack.planning.best_fit import Bins, best_fit_decreasing, fewest_bins
from ismdata.pack.planning.cutting_stock import column_generation
from ismdata.pack.planning.exact_completion import exact_completion

#: A plan within this factor of the bound is taken as it is: no other one can save more.
_GOOD_ENOUGH = 1.0005

_PLANS: tuple[Callable[[NDArray[np.int64], int], Bins], ...] = (
    best_fit_decreasing,
    exact_completion,
    column_generation,
)


def best_bins(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """The plan with the fewest sequences of those that were made; the earlier one at a tie. histogram: int64[T + 1],
    documents per length.
    """
    enough = fewest_bins(histogram, seq_len) * _GOOD_ENOUGH
    plans: list[Bins] = []
    for make in _PLANS:
        plans.append(make(histogram, seq_len))
        if plans[-1].rows <= enough:
            break
    return min(plans, key=lambda plan: plan.rows)
