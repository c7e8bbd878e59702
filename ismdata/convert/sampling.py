"""Samples and splits, decided by hashes: the number of workers, the blocks and the machine make no difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from ismdata.errors import UsageError

#: The folders of a split, in order.
SPLIT_NAMES = ("train", "validation", "test")
#: Keys that `draw_sample` computes at a time.
_CHUNK = 1 << 20


def draw_sample(count: int, n: int, seed: int) -> NDArray[np.bool_]:
    """Draw `n` of `count` conversations uniformly at random.

    The key of a conversation is a hash of its number and the seed; those with the lowest keys are drawn.

    Args:
        count: How many conversations there are.
        n: How many to draw; all are drawn if there are not more.
        seed: Seed of the keys.

    Returns:
        bool[count], the conversations that are drawn.

    Raises:
        UsageError: If `n` is below 1.

    Example:
        >>> np.flatnonzero(draw_sample(10, 3, seed=0)).tolist()
        [2, 6, 8]
    """
    if n < 1:
        raise UsageError(f"--sample {n}: expected 1 or more")
    if n >= count:
        return np.ones(count, np.bool_)
    lowest = np.empty(0, np.uint64)
    for first in range(0, count, _CHUNK):
        lowest = np.concatenate([lowest, _keys(first, min(first + _CHUNK, count), seed)])
        if len(lowest) > n:
            lowest = np.partition(lowest, n - 1)[:n]
    highest = lowest.max()
    chosen = np.empty(count, np.bool_)
    for first in range(0, count, _CHUNK):
        last = min(first + _CHUNK, count)
        chosen[first:last] = _keys(first, last, seed) <= highest
    return chosen


def _keys(first: int, last: int, seed: int) -> NDArray[np.uint64]:
    """Keys of the conversations first:last, all different: the outputs of the splitmix64 generator at these indices."""
    start = np.uint64(xxhash.xxh3_64_intdigest(str(seed).encode()))
    z = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return keys


def parse_split(text: str) -> tuple[float, ...]:
    """Parse the shares of `--split`: two or three positive numbers, in the order of SPLIT_NAMES.

    They add up to 1, or to 100 as percentages, with or without signs. Raises UsageError if they do not.

    >>> parse_split("0.9/0.05/0.05"), parse_split("90/10")
    ((0.9, 0.05, 0.05), (0.9, 0.1))
    """
    expected = "expected two or three positive shares that add up to 1 or 100, such as 0.98/0.02 or 98/2"
    percent = [share.strip().endswith("%") for share in text.split("/")]
    try:
        shares = tuple(float(share.strip().removesuffix("%")) for share in text.split("/"))
    except ValueError as error:
        raise UsageError(f"--split {text}: not numbers separated by slashes; {expected}") from error
    if len(shares) not in (2, 3):
        raise UsageError(f"--split {text}: found {len(shares)} share{'s'[: len(shares) != 1]}; {expected}")
    total = math.fsum(shares)
    if all(percent) or (not any(percent) and math.isclose(total, 100, abs_tol=1e-4)):
        shares = tuple(share / 100 for share in shares)
    if not all(share > 0 for share in shares) or not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise UsageError(f"--split {text}: adds up to {total:g}{'%' * all(percent)}; {expected}")
    return shares


def split_numbers(
    digests: NDArray[np.uint64], groups: Sequence[str | None], shares: Sequence[float]
) -> NDArray[np.int64]:
    """Assign each of N conversations to a part of a split, by a hash.

    Args:
        digests: uint64[N, 2], computed without roles, so that a dialogue and the same dialogue with its sides swapped
            are assigned to the same part.
        groups: The `Draft.split_group` of each conversation. If it is not None, its hash decides instead of the digest;
            an equal conversation without the group can then be in another part.
        shares: The share of each part.

    Returns:
        int64[N], indices into `shares`.
    """
    keys = digests[:, 0].copy()
    for row, group in enumerate(groups):
        if group is not None:
            keys[row] = xxhash.xxh3_64_intdigest(group.encode())
    uniform = (keys >> np.uint64(11)).astype(np.float64) / 2**53
    borders = np.cumsum(np.asarray(shares, np.float64))[:-1]
    numbers: NDArray[np.int64] = np.searchsorted(borders, uniform, side="right").astype(np.int64)
    return numbers
