"""Which conversations a sample holds, and on which side of a split each stands: by hashes, never by chance.

Neither depends on the number of workers, on blocks or on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from ismdata.errors import UsageError

#: What the parts of a split are called, in their order.
SPLIT_NAMES = ("train", "validation", "test")
#: Keys that `sampled` holds at a time, beside the n lowest.
_CHUNK = 1 << 20


def sampled(count: int, n: int, seed: int) -> NDArray[np.bool_]:
    """`n` of `count` conversations, uniformly: bool[count]; all of them where there are no more than `n`.

    The n with the lowest keys, a key being a hash of the conversation's number and `seed`. Raises UsageError when `n`
    is below 1.

    >>> np.flatnonzero(sampled(10, 3, seed=0)).tolist()
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
    """Keys of the numbers first:last under `seed`, no two alike: the splitmix64 generator at these places."""
    start = np.uint64(xxhash.xxh3_64_intdigest(str(seed).encode()))
    z = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return keys


def parse_split(text: str) -> tuple[float, ...]:
    """The parts of `--split`: two or three positive numbers that add up to 1, named as in SPLIT_NAMES.

    Raises UsageError where they are not that.

    >>> parse_split("0.9/0.05/0.05")
    (0.9, 0.05, 0.05)
    """
    expected = "expected two or three positive parts that add up to 1, such as 0.98/0.02"
    try:
        parts = tuple(float(part) for part in text.split("/"))
    except ValueError as error:
        raise UsageError(f"--split {text}: not numbers between slashes; {expected}") from error
    if len(parts) not in (2, 3):
        raise UsageError(f"--split {text}: {len(parts)} parts; {expected}")
    if not all(part > 0 for part in parts) or not math.isclose(math.fsum(parts), 1, abs_tol=1e-6):
        raise UsageError(f"--split {text}: adds up to {math.fsum(parts):g}; {expected}")
    return parts


def split_of(digests: NDArray[np.uint64], kin: Sequence[str | None], fractions: Sequence[float]) -> NDArray[np.int64]:
    """The part of a split, a position in `fractions`, that each of N conversations stands in, int64[N].

    digests: uint64[N, 2], without roles, so that both tellings of a talk stand together. kin: what ties conversations
    together, such as the name of their tree; where it is not None it decides in place of the digest, and a repeat from
    elsewhere may then stand in another part.
    """
    keys = digests[:, 0].copy()
    for row, name in enumerate(kin):
        if name is not None:
            keys[row] = xxhash.xxh3_64_intdigest(name.encode())
    places = (keys >> np.uint64(11)).astype(np.float64) / 2**53
    borders = np.cumsum(np.asarray(fractions, np.float64))[:-1]
    parts: NDArray[np.int64] = np.searchsorted(borders, places, side="right").astype(np.int64)
    return parts
