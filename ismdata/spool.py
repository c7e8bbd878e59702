"""Documents on their way from tokenizing to packing: on disk, in flat files that are read back as memory maps.

In memory stay only the lengths: a few bytes a document, whatever the size of the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.batch import IntArray
from ismdata.tokens import Documents, ragged_arange


class _Column:
    """One flat file of fixed-size rows."""

    def __init__(self, path: Path, dtype: Any, width: int = 1) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self._file: IO[bytes] | None = path.open("wb")

    def append(self, values: NDArray[Any]) -> None:
        assert self._file is not None
        self._file.write(np.ascontiguousarray(values, self.dtype).data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def map(self) -> NDArray[Any]:
        """The whole file as rows, memory-mapped."""
        shape = (-1, self.width) if self.width > 1 else (-1,)
        if self.path.stat().st_size == 0:
            return np.empty(0, self.dtype).reshape(shape)
        return np.memmap(self.path, self.dtype, "r").reshape(shape)


class Spool:
    """Documents in the order in which they were made. `append` while tokenizing, then `seal`, then `gather`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._ids = _Column(folder / "input_ids", np.int32)
        self._spans = _Column(folder / "spans", np.int32, width=4)
        self._weights = _Column(folder / "span_weights", np.float32)
        self._names = _Column(folder / "conversation_ids", np.uint8)
        self._lengths: list[NDArray[np.int32]] = []
        self._span_counts: list[NDArray[np.int32]] = []
        self._name_lengths: list[NDArray[np.int32]] = []

    def append(self, documents: Documents, names: list[str]) -> None:
        """Add documents and the conversation ids to write beside them."""
        self._ids.append(documents.input_ids)
        self._spans.append(documents.spans)
        self._weights.append(documents.span_weights)
        encoded = [name.encode() for name in names]
        self._names.append(np.frombuffer(b"".join(encoded), np.uint8))
        self._lengths.append(documents.lengths.astype(np.int32))
        self._span_counts.append(documents.span_counts.astype(np.int32))
        self._name_lengths.append(np.array([len(name) for name in encoded], np.int32))

    def seal(self) -> NDArray[np.int32]:
        """End writing; the lengths of all documents, int32[D]."""
        columns = (self._ids, self._spans, self._weights, self._names)
        for column in columns:
            column.close()
        self._maps = [column.map() for column in columns]
        self.lengths, self.span_counts, self.name_lengths = map(
            _joined, (self._lengths, self._span_counts, self._name_lengths)
        )
        self._starts = [_starts(of) for of in (self.lengths, self.span_counts, self.name_lengths)]
        return self.lengths

    def gather(self, documents: IntArray) -> Gathered:
        """The documents numbered, in that order."""
        ids, spans, weights, names = self._maps
        id_starts, span_starts, name_starts = (starts[documents] for starts in self._starts)
        lengths = self.lengths[documents].astype(np.int64)
        span_counts = self.span_counts[documents].astype(np.int64)
        name_lengths = self.name_lengths[documents].astype(np.int64)
        span_rows = ragged_arange(span_starts, span_counts)
        name_bytes = names[ragged_arange(name_starts, name_lengths)]
        offsets = np.concatenate([[0], np.cumsum(name_lengths)]).astype(np.int32)
        return Gathered(
            input_ids=ids[ragged_arange(id_starts, lengths)],
            lengths=lengths,
            span_counts=span_counts,
            spans=spans[span_rows],
            span_weights=weights[span_rows],
            names=pa.StringArray.from_buffers(
                len(documents), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(name_bytes))
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Documents read back from the spool: the columns of tokens.Documents, and their conversation ids."""

    input_ids: NDArray[np.int32]
    lengths: IntArray
    span_counts: IntArray
    spans: NDArray[np.int32]
    span_weights: NDArray[np.float32]
    names: pa.StringArray


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *parts])


def _starts(lengths: NDArray[np.int32]) -> IntArray:
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths
