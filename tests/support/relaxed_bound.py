"""The strongest lower bound on the number of bins, against which plans are measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ismdata.pack.planning.best_fit import best_fit_decreasing
from ismdata.pack.planning.cutting_stock import ROUNDS, Relaxation, relax


def relaxed_bound(histogram: NDArray[np.int64], seq_len: int) -> int:
    """Return a number of bins that no plan can go below: the optimum of the linear relaxation, rounded up."""
    relaxation = Relaxation(histogram, best_fit_decreasing(histogram, seq_len))
    return relax(relaxation, histogram[relaxation.size], target=0, rounds=10 * ROUNDS)[1]
