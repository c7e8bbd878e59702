"""Confidence intervals and paired tests by the percentile bootstrap, over groups.

Tokens of one conversation are not independent of each other, conversations are; so whole conversations are drawn, with
replacement, and every statistic is computed anew from those drawn. All statistics here are functions of sums over
conversations, so a resample is a row of counts and its sums are one matrix product. scipy.stats.bootstrap would make an
index array of resamples x conversations for each statistic anew, which is why this is no call of it.

Sources: B. Efron, "Bootstrap methods: another look at the jackknife" (1979), for the percentile interval; P. Koehn,
"Statistical significance tests for machine translation evaluation" (2004), for the paired test.

Shape legend: G groups, S sums of a group, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.errors import UsageError

FloatArray = NDArray[np.float64]
#: From sums, float64[R, S], to the statistic of each row, float64[R]; NaN where a row has none.
Statistic = Callable[[FloatArray], FloatArray]

#: Counts held at once: 64 MiB.
_CHUNK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How often to draw, from which seed, and how wide an interval is."""

    resamples: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UsageError(f"--resamples is {self.resamples}; expected 1 or more")

    def interval(self, replicates: FloatArray) -> tuple[float, float] | None:
        """The percentile interval of a statistic's resamples, float64[R].

        None where it could be computed in fewer than half of them: too few groups have any part in it.
        """
        known = replicates[np.isfinite(replicates)]
        if 2 * len(known) < len(replicates):
            return None
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return float(low), float(high)

    def sums(self, values: ArrayLike) -> FloatArray:
        """Sums over resampled groups, float64[R, S], of values, [G, S]: each resample is G groups with replacement.

        The same groups are drawn for the same seed and G, so that two calls are paired.
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
    """The first sum over the second, [R, 2] to [R]; NaN where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] != 0, sums[:, 0] / sums[:, 1], np.nan)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic of the data at hand, and its interval; None where there are too few groups for one."""

    value: float
    interval: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


def estimate(values: ArrayLike, statistic: Statistic, bootstrap: Bootstrap) -> Estimate:
    """A statistic of groups and its interval. values: [G, S], one row a group. One group alone has no interval."""
    table = np.asarray(values, np.float64)
    value = float(statistic(table.sum(0, keepdims=True))[0])
    interval = bootstrap.interval(statistic(bootstrap.sums(table))) if len(table) > 1 else None
    return Estimate(value=value, interval=interval)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one system has more of a statistic than another, its interval, and how likely chance alone gives as much."""

    value: float
    interval: tuple[float, float] | None
    p_value: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "p_value": self.p_value,
        }


def paired_difference(values: ArrayLike, other: ArrayLike, statistic: Statistic, bootstrap: Bootstrap) -> Difference:
    """statistic(values) - statistic(other), [G, S] each, row by row of the same groups.

    The p-value is two-sided: twice the share of resamples, the data at hand among them, in which the difference has
    the other sign or is 0; and no less than 2 / 2^G, which is as likely as G coins that fall on one side. One group
    alone has neither interval nor p-value.
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
