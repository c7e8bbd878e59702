"""Tokenized documents on disk, between tokenizing and writing: flat files that are read back in any order.

No document stays in memory. After an interruption, spooling resumes after the last recorded document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.arrays import IntArray
from ismdata.data import ColumnFile
from ismdata.pack.requests import TokenizedDocuments

#: The files, with the type and width of their rows. `*_starts` are each document's first row in the file named.
_FILES: dict[str, tuple[Any, int]] = {
    "input_ids": (np.int32, 1),
    "spans": (np.int32, 4),
    "span_weights": (np.float32, 1),
    "conversation_ids": (np.uint8, 1),
    "lengths": (np.int32, 1),
    "span_counts": (np.int32, 1),
    "name_lengths": (np.int32, 1),
    "id_starts": (np.int64, 1),
    "span_starts": (np.int64, 1),
    "name_starts": (np.int64, 1),
}

#: Files with one row per document. Only these are memory-mapped.
_MAPPED = ("lengths", "span_counts", "name_lengths", "id_starts", "span_starts", "name_starts")


class Spool:
    """Tokenized documents in the order in which they were appended: `append`, then `seal`, then `gather`.

    Args:
        folder: The folder of the files.
        keep: The `rows` that an interrupted run recorded; what it wrote after them is discarded.

    Raises:
        DataError: If a file has fewer rows than recorded.
    """

    def __init__(self, folder: Path, *, keep: Mapping[str, int] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._columns = {
            name: ColumnFile(folder / name, dtype, width, keep=keep[name] if keep else 0)
            for name, (dtype, width) in _FILES.items()
        }

    @property
    def columns(self) -> list[ColumnFile]:
        """All files of the spool."""
        return list(self._columns.values())

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows in each file."""
        return {name: column.rows for name, column in self._columns.items()}

    def append(self, documents: TokenizedDocuments, names: list[str]) -> None:
        """Append documents and their conversation ids."""
        encoded = [name.encode() for name in names]
        name_lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        added: dict[str, NDArray[Any]] = {
            "id_starts": self._starts("input_ids", documents.lengths),
            "span_starts": self._starts("spans", documents.span_counts),
            "name_starts": self._starts("conversation_ids", name_lengths),
            "input_ids": documents.input_ids,
            "spans": documents.spans,
            "span_weights": documents.span_weights,
            "conversation_ids": np.frombuffer(b"".join(encoded), np.uint8),
            "lengths": documents.lengths,
            "span_counts": documents.span_counts,
            "name_lengths": name_lengths,
        }
        for name, values in added.items():
            self._columns[name].append(values)

    def _starts(self, name: str, lengths: IntArray) -> IntArray:
        """The first row in a file of each document to append."""
        return np.cumsum(lengths, dtype=np.int64) - lengths + self._columns[name].rows

    def close(self) -> None:
        """Close all files."""
        for column in self._columns.values():
            column.close()

    def seal(self) -> NDArray[np.int32]:
        """End writing; return the lengths of all documents, int32[D], memory-mapped."""
        self.close()
        self._maps = {name: self._columns[name].map() for name in _MAPPED}
        return self._maps["lengths"]

    def gather(self, documents: IntArray) -> SpooledDocuments:
        """Return copies of the documents of these numbers, in that order. The pages of the files are released."""
        lengths, span_counts, name_lengths = (
            self._maps[name][documents].astype(np.int64) for name in ("lengths", "span_counts", "name_lengths")
        )
        span_starts = self._maps["span_starts"][documents]
        names = self._columns["conversation_ids"].read(self._maps["name_starts"][documents], name_lengths)
        offsets = np.concatenate([[0], np.cumsum(name_lengths)]).astype(np.int32)
        gathered = SpooledDocuments(
            input_ids=self._columns["input_ids"].read(self._maps["id_starts"][documents], lengths),
            lengths=lengths,
            span_counts=span_counts,
            spans=self._columns["spans"].read(span_starts, span_counts),
            span_weights=self._columns["span_weights"].read(span_starts, span_counts),
            names=pa.StringArray.from_buffers(len(documents), pa.py_buffer(offsets), pa.py_buffer(names)),
        )
        for name in _MAPPED:
            self._columns[name].release()
        return gathered


@dataclass(frozen=True, kw_only=True)
class SpooledDocuments:
    """Documents read back from the spool: the columns of `TokenizedDocuments`, and `names`, their conversation ids."""

    input_ids: NDArray[np.int32]
    lengths: IntArray
    span_counts: IntArray
    spans: NDArray[np.int32]
    span_weights: NDArray[np.float32]
    names: pa.StringArray
