"""What a verification finds: sentences in the order of finding, of a kind of problem in one file only the first.

A broken invariant tends to be broken in thousands of rows. A person needs the first of them and their number.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class Problems:
    """Collects sentences; of row problems of one kind in one file, the first and a count."""

    def __init__(self) -> None:
        self._first: dict[object, str] = {}
        self._more: Counter[object] = Counter()

    def __len__(self) -> int:
        return len(self._first)

    def add(self, sentence: str) -> None:
        self._first[sentence] = sentence

    def add_rows(self, path: Path, kind: str, sentence: str, rows: int) -> None:
        """`rows` rows of `path` have a problem of this kind; `sentence` tells of the first."""
        if (path, kind) not in self._first:
            self._first[path, kind] = f"{path}: {sentence}"
            rows -= 1
        self._more[path, kind] += rows

    def sentences(self) -> list[str]:
        more = ((sentence, self._more[key]) for key, sentence in self._first.items())
        return [f"{sentence} ({rows} more rows likewise)" if rows else sentence for sentence, rows in more]
