"""Choose among the planning algorithms: try one after the other until a plan is close enough to the lower bound.

- Best-fit decreasing (best_fit.py) takes milliseconds and is nearly optimal for most corpora.
- Exact completion (exact_completion.py) helps if lengths are similar.
- Column generation (cutting_stock.py) helps if a sequence holds only a few documents, so that few combinations fit.

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

#: A plan within this factor of the lower bound is accepted: no other plan can save more.
_GOOD_ENOUGH = 1.0005

_ALGORITHMS: tuple[Callable[[NDArray[np.int64], int], Bins], ...] = (
    best_fit_decreasing,
    exact_completion,
    column_generation,
)


def best_bins(histogram: NDArray[np.int64], seq_len: int) -> Bins:
    """Return the first plan that is good enough, or else the one with the fewest bins.

    Args:
        histogram: int64[T + 1], documents per length.
        seq_len: T.

    Returns:
        The bins.
    """
    enough = fewest_bins(histogram, seq_len) * _GOOD_ENOUGH
    plans: list[Bins] = []
    for algorithm in _ALGORITHMS:
        plans.append(algorithm(histogram, seq_len))
        if plans[-1].rows <= enough:
            break
    return min(plans, key=lambda plan: plan.rows)
