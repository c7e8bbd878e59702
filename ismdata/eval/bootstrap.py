"""Confidence intervals and paired tests by the percentile bootstrap over conversations.

Tokens of one conversation depend on each other; conversations do not. So whole conversations (groups) are resampled
with replacement, and each statistic is recomputed on every resample. All statistics here are functions of sums over
groups, so a resample is a row of counts and all sums are one matrix product. scipy.stats.bootstrap would instead build
an index array of resamples x groups for every statistic.

References: B. Efron, "Bootstrap methods: another look at the jackknife" (1979), for the percentile interval; P. Koehn,
"Statistical significance tests for machine translation evaluation" (2004), for the paired test.

Shape legend: G groups, S sums per group, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.errors import UsageError

FloatArray = NDArray[np.float64]
#: Maps sums, float64[R, S], to the statistic of each row, float64[R]; NaN where it is undefined.
Statistic = Callable[[FloatArray], FloatArray]

#: Counts in memory at a time: 64 MiB.
_CHUNK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Settings of the bootstrap.

    Attributes:
        resamples: Number of resamples.
        seed: Seed of the random number generator.
        confidence: Coverage of an interval, between 0 and 1.

    Raises:
        UsageError: If `resamples` is below 1.
    """

    resamples: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UsageError(f"--resamples is {self.resamples}; expected 1 or more")

    def interval(self, replicates: FloatArray) -> tuple[float, float] | None:
        """The percentile interval of a statistic.

        Args:
            replicates: The statistic of each resample, float64[R]; NaN where it is undefined.

        Returns:
            The ends of the interval, or None if the statistic is undefined in more than half of the resamples.
        """
        known = replicates[np.isfinite(replicates)]
        if 2 * len(known) < len(replicates):
            return None
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return float(low), float(high)

    def sums(self, values: ArrayLike) -> FloatArray:
        """Sum the values of each resample, G groups drawn with replacement.

        The same seed and G draw the same groups, so results of two calls are paired.

        Args:
            values: Values of each group, [G, S].

        Returns:
            Sums over the groups of each resample, float64[R, S].
        """
        table = np.asarray(values, np.float64)
        groups = len(table)
        generator = np.random.default_rng(self.seed)
        rows = max(1, _CHUNK // max(groups, 1))
        parts = []
        for first in range(0, self.resamples, rows):
            count = min(rows, self.resamples - first)
            drawn = generator.multinomial(groups, np.full(groups, 1 / groups), size=count)
            parts.append(drawn @ table)
        return np.concatenate(parts)


def ratio(sums: FloatArray) -> FloatArray:
    """The first sum divided by the second, [R, 2] to [R]; NaN where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] != 0, sums[:, 0] / sums[:, 1], np.nan)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic of the data and its confidence interval; None where there are too few groups for one."""

    value: float
    interval: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        """The estimate as eval.json stores it."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


def estimate(values: ArrayLike, statistic: Statistic, bootstrap: Bootstrap) -> Estimate:
    """Compute a statistic and its interval.

    Args:
        values: Values of each group, [G, S]. A single group has no interval.
        statistic: The statistic, as a function of sums over groups.
        bootstrap: How to resample.

    Returns:
        The statistic of all groups, with its interval.
    """
    table = np.asarray(values, np.float64)
    value = float(statistic(table.sum(0, keepdims=True))[0])
    interval = bootstrap.interval(statistic(bootstrap.sums(table))) if len(table) > 1 else None
    return Estimate(value=value, interval=interval)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A statistic of one system minus that of another, its interval, and the p-value of no difference."""

    value: float
    interval: tuple[float, float] | None
    p_value: float | None

    def as_json(self) -> dict[str, Any]:
        """The difference as eval.json stores it."""
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "p_value": self.p_value,
        }


def paired_difference(values: ArrayLike, other: ArrayLike, statistic: Statistic, bootstrap: Bootstrap) -> Difference:
    """Compute `statistic(values) - statistic(other)` with both systems resampled together.

    The p-value is two-sided: twice the share of resamples whose difference is 0 or has the other sign, where the data
    themselves count as one more resample. It is at least 2 / 2^G, the probability that G fair coins all show one side.

    Args:
        values: Values of the first system for each group, [G, S].
        other: Values of the second system for the same groups in the same order, [G, S].
        statistic: The statistic, as a function of sums over groups.
        bootstrap: How to resample.

    Returns:
        The difference; a single group has neither interval nor p-value.
    """
    left, right = np.asarray(values, np.float64), np.asarray(other, np.float64)
    value = float(statistic(left.sum(0, keepdims=True))[0] - statistic(right.sum(0, keepdims=True))[0])
    if len(left) < 2:
        return Difference(value=value, interval=None, p_value=None)
    replicates = statistic(bootstrap.sums(left)) - statistic(bootstrap.sums(right))
    known = replicates[np.isfinite(replicates)]
    crossing = min(int((known <= 0).sum()), int((known >= 0).sum()))
    p_value = min(1.0, max(2 * (crossing + 1) / (len(known) + 1), 2.0 ** (1 - len(left))))
    return Difference(value=value, interval=bootstrap.interval(replicates), p_value=p_value)
