"""Near duplicates: conversations that share most of their runs of five words (shingles) with an earlier one.

Two conversations are near duplicates if the Jaccard similarity of their sets of shingles is at least 0.8. MinHash
estimates it from 128 minima; an LSH index finds the candidates. Both are from datasketch, the extra `dedup`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ismdata.errors import UsageError

#: The least similarity of near duplicates.
THRESHOLD = 0.8
#: Minima per signature. The standard error of an estimate near the threshold is 0.035.
MINIMA = 128
#: Words per shingle.
SHINGLE = 5

#: Weights of false positives and false negatives in the LSH index. False positives are removed afterwards.
_WEIGHTS = (0.1, 0.9)
#: Shingles hashed at a time, 512 bytes each.
_AT_ONCE = 1 << 13

#: Characters of scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana and Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
#: An odd multiplier per word of a shingle.
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(1, SHINGLE + 1)], np.uint64)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation. In scripts without spaces, each character is a word.

    >>> words("Guten Morgen, 你好!")
    ['guten', 'morgen', '你', '好']
    """
    return _WORD.findall(text.lower())


def shingles(text: str) -> NDArray[np.uint32]:
    """The distinct hashes of all runs of SHINGLE words, sorted, uint32[S] with S > 0.

    A text with fewer words is one run; a text without words is one run that consists of the text itself.
    """
    found = words(text) or [text]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, [word.encode() for word in found]), np.uint64, len(found))
    width = min(SHINGLE, len(found))
    mixed = np.lib.stride_tricks.sliding_window_view(hashes, width) @ _FACTORS[:width]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


class NearIndex:
    """The signatures of the conversations kept so far. Each needs about 5 kB of memory, most of it in the LSH index.

    Raises:
        UsageError: If datasketch is not installed.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UsageError(
                "--dedup near: the package datasketch is not installed; expected it. Install it with: "
                "pip install ismdata[dedup]"
            ) from error
        self._empty = MinHash(MINIMA, seed=1, scheme="affine32", hashfunc=int)
        self._lsh = MinHashLSH(threshold=THRESHOLD, num_perm=MINIMA, weights=_WEIGHTS)
        self._signatures = np.empty((1024, MINIMA), np.uint32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def signatures(self) -> NDArray[np.uint32]:
        """All signatures in the order in which they were added, uint32[len, MINIMA]."""
        return self._signatures[: self._count]

    def signature(self, text: str) -> Any:
        """The signature of a text, a `datasketch.MinHash`."""
        minima = self._empty.copy()
        hashes = shingles(text)
        for first in range(0, len(hashes), _AT_ONCE):
            minima.update_batch(hashes[first : first + _AT_ONCE].tolist())
        return minima

    def nearest(self, signature: Any) -> tuple[int, float] | None:
        """The index of the most similar signature and the estimated similarity; None if that is below THRESHOLD.

        Of equally similar ones the first is returned.
        """
        candidates = np.array(sorted(self._lsh.query(signature)), np.int64)
        if not len(candidates):
            return None
        similar = (self._signatures[candidates] == signature.hashvalues).mean(axis=1)
        best = int(similar.argmax())
        return (int(candidates[best]), float(similar[best])) if similar[best] >= THRESHOLD else None

    def add(self, signature: Any) -> None:
        """Add a signature that `signature` returned."""
        if self._count == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._count] = signature.hashvalues
        self._lsh.insert(self._count, signature, check_duplication=False)
        self._count += 1

    def restore(self, signatures: NDArray[np.uint32]) -> None:
        """Add the `signatures` of an interrupted run, uint32[S, MINIMA]."""
        for row in np.asarray(signatures):
            minima = self._empty.copy()
            minima.hashvalues = row.copy()
            self.add(minima)
