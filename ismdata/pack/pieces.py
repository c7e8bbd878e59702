"""Pieces of documents as columns.

Shape legend: R requests (documents), P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ismdata.arrays import IntArray, ragged_arange


@dataclass(frozen=True, kw_only=True)
class PieceBlock:
    """Pieces of some documents: those of one document together and in order.

    Attributes:
        request: int64[P], the document.
        span: int64[P], numbers the spans within the document.
        kind: int64[P], the kind of the span.
        message: int64[P], the assistant message (within the document) that the piece belongs to; -1 for context.
        run: int64[P], number in the batch's `BatchRuns`.
        controls: int64[P], control tokens that the template wrote.
    """

    request: IntArray
    span: IntArray
    kind: IntArray
    message: IntArray
    run: IntArray
    controls: IntArray

    def select(self, places: IntArray, requests: IntArray, count: int) -> PieceBlock:
        """Return the pieces of some documents under other numbers.

        Args:
            places: The documents to select, of `count` in this block.
            requests: Their numbers in the result.
            count: Number of documents in this block.

        Returns:
            Their pieces, in the order of `places`.
        """
        if len(places) == count and np.array_equal(places, requests):
            return self
        sizes = np.bincount(self.request, minlength=count)
        rows = ragged_arange((np.cumsum(sizes) - sizes)[places], sizes[places])
        columns = {name: getattr(self, name)[rows] for name in self.__dataclass_fields__}
        return PieceBlock(**columns | {"request": np.repeat(requests, sizes[places])})

    @staticmethod
    def merge(blocks: Sequence[PieceBlock]) -> PieceBlock:
        """Return all pieces, ordered by request. No two blocks have pieces of the same request."""
        blocks = [block for block in blocks if len(block.request)]
        if len(blocks) < 2:  # the most frequent case: all documents have skeletons
            return blocks[0] if blocks else NO_PIECES
        order = np.argsort(np.concatenate([block.request for block in blocks]), kind="stable")
        names = PieceBlock.__dataclass_fields__
        return PieceBlock(**{name: np.concatenate([getattr(block, name) for block in blocks])[order] for name in names})


NO_PIECES = PieceBlock(**{name: np.empty(0, np.int64) for name in PieceBlock.__dataclass_fields__})


def number_rows(rows: IntArray) -> tuple[IntArray, IntArray]:
    """Number equal rows alike, in the order of their first occurrence.

    Hashes the rows, which takes a quarter of the time of sorting them.

    Args:
        rows: int64[N, width], contiguous.

    Returns:
        The number of each row, int[N], and the place of the first row of each number, int64.

    Example:
        >>> numbers, firsts = number_rows(np.array([[3, 1], [2, 2], [3, 1]]))
        >>> numbers.tolist(), firsts.tolist()
        ([0, 1, 0], [0, 1])
    """
    width = rows.shape[1] * rows.itemsize
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])
    encoded = column.dictionary_encode()
    numbers = encoded.indices.to_numpy()
    firsts = np.empty(len(encoded.dictionary), np.int64)
    firsts[numbers[::-1]] = np.arange(len(rows))[::-1]
    return numbers, firsts


def pad_columns(matrix: IntArray, width: int) -> IntArray:
    """Append columns of -1 up to `width` columns."""
    missing = width - matrix.shape[1]
    return np.pad(matrix, ((0, 0), (0, missing)), constant_values=-1) if missing else matrix
