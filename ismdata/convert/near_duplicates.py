"""Near duplicates: conversations most of whose runs of words also stand in an earlier one.

A conversation is the set of its runs of five words. Two are near duplicates when the sets share at least 0.8 of what
either holds (Jaccard similarity), as MinHash estimates it from 128 minima; the candidates come from an LSH index. Both
are datasketch's, the extra `dedup`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ismdata.errors import UsageError

#: Similarity from which on a conversation counts as a near duplicate.
THRESHOLD = 0.8
#: Minima of a signature: the standard error of an estimate near the threshold is 0.035.
MINIMA = 128
#: Words that make a shingle.
SHINGLE = 5

#: What an LSH index weighs, false positives and false negatives: the former are sorted out afterwards.
_WEIGHTS = (0.1, 0.9)
#: Shingles whose minima are taken at a time: 512 bytes each.
_AT_ONCE = 1 << 13

#: Letters of scripts that put no blanks between words: Thai, Lao, Myanmar, Khmer, kana and Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
#: One odd multiplier for each word of a shingle.
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(1, SHINGLE + 1)], np.uint64)


def words(text: str) -> list[str]:
    """The words of a text in lower case; where a script has no blanks each letter is one. Marks are left out.

    >>> words("Guten Morgen, 你好!")
    ['guten', 'morgen', '你', '好']
    """
    return _WORD.findall(text.lower())


def shingles(text: str) -> NDArray[np.uint32]:
    """Hashes of all runs of SHINGLE words, sorted, each once; uint32[S], S above 0.

    A text of fewer words is one run, one of none a run by itself.
    """
    found = words(text) or [text]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, [word.encode() for word in found]), np.uint64, len(found))
    width = min(SHINGLE, len(found))
    mixed = np.lib.stride_tricks.sliding_window_view(hashes, width) @ _FACTORS[:width]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


class NearIndex:
    """Signatures of the conversations kept so far. About 5 kB of memory each, nearly all of it the LSH index's.

    Raises UsageError when datasketch is not installed.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UsageError(
                "--dedup near: the package datasketch is not installed. Install it with: pip install ismdata[dedup]"
            ) from error
        self._empty = MinHash(MINIMA, seed=1, scheme="affine32", hashfunc=int)
        self._lsh = MinHashLSH(threshold=THRESHOLD, num_perm=MINIMA, weights=_WEIGHTS)
        self._signatures = np.empty((1024, MINIMA), np.uint32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def signatures(self) -> NDArray[np.uint32]:
        """Of all that was added, in order, uint32[len, MINIMA]."""
        return self._signatures[: self._count]

    def signature(self, text: str) -> Any:
        """The MinHash of a text."""
        minima = self._empty.copy()
        hashes = shingles(text)
        for first in range(0, len(hashes), _AT_ONCE):
            minima.update_batch(hashes[first : first + _AT_ONCE].tolist())
        return minima

    def nearest(self, signature: Any) -> tuple[int, float] | None:
        """The most similar of those added, its number and the estimated similarity; None when none reaches THRESHOLD.

        Of equally similar ones the first.
        """
        candidates = np.array(sorted(self._lsh.query(signature)), np.int64)
        if not len(candidates):
            return None
        similar = (self._signatures[candidates] == signature.hashvalues).mean(axis=1)
        best = int(similar.argmax())
        return (int(candidates[best]), float(similar[best])) if similar[best] >= THRESHOLD else None

    def add(self, signature: Any) -> None:
        if self._count == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._count] = signature.hashvalues
        self._lsh.insert(self._count, signature, check_duplication=False)
        self._count += 1

    def restore(self, signatures: NDArray[np.uint32]) -> None:
        """Add signatures that `signatures` gave in an earlier run."""
        for row in np.asarray(signatures):
            minima = self._empty.copy()
            minima.hashvalues = row.copy()
            self.add(minima)
