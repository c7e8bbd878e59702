"""The problems that a verification finds, as sentences.

A fault tends to repeat in thousands of rows, so that only the first row of each kind of fault is described per file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class Problems:
    """Collects problems in the order in which they are found.

    Example:
        >>> problems = Problems()
        >>> problems.add_rows(Path("shard"), "ids", "row 3: input_ids is -1; expected 0 or more", rows=2)
        >>> problems.sentences()
        ['shard: row 3: input_ids is -1; expected 0 or more (1 more rows have this problem)']
    """

    def __init__(self) -> None:
        self._first: dict[object, str] = {}
        self._more: Counter[object] = Counter()

    def __len__(self) -> int:
        return len(self._first)

    def add(self, sentence: str) -> None:
        """Add a problem. Equal sentences count once."""
        self._first[sentence] = sentence

    def add_rows(self, path: Path, kind: str, sentence: str, rows: int) -> None:
        """Add a problem of `rows` rows of a file; `sentence` describes the first. Of each kind only one is kept."""
        if (path, kind) not in self._first:
            self._first[path, kind] = f"{path}: {sentence}"
            rows -= 1
        self._more[path, kind] += rows

    def sentences(self) -> list[str]:
        """All problems, with the number of further rows."""
        more = ((sentence, self._more[key]) for key, sentence in self._first.items())
        return [f"{sentence} ({rows} more rows have this problem)" if rows else sentence for sentence, rows in more]
