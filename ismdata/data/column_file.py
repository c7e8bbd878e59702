"""Flat files of fixed-size rows: written end to end, cut back to where an interrupted run was, read back by rows or as
memory maps."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ismdata.data.output_folder import reopen
from ismdata.errors import DataError


class ColumnFile:
    """One flat file of rows, each `width` values of `dtype`. `append` in order, then `close`, then `map` or `read`.

    keep: rows of an existing file to go on after; what follows them is cut off. Raises DataError where the file has
    fewer.
    """

    def __init__(self, path: Path, dtype: DTypeLike, width: int = 1, *, keep: int = 0) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self.rows = keep
        self._map: mmap.mmap | None = None
        self._file = reopen(path, keep * self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * self.width

    def append(self, values: ArrayLike) -> None:
        """Write rows: values of shape (n,), or (n, width) where the width is above 1."""
        rows = np.ascontiguousarray(values, self.dtype)
        if rows.size % self.width:
            raise ValueError(f"{self.path.name}: {rows.size} values; expected whole rows of {self.width}")
        self._file.write(rows.data)
        self.rows += rows.size // self.width

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def map(self) -> NDArray[Any]:
        """All rows, memory-mapped, read-only: shape (rows,), or (rows, width) where the width is above 1."""
        shape = (self.rows, self.width) if self.width > 1 else (self.rows,)
        if not self.rows:  # an empty file cannot be mapped
            return np.empty(shape, self.dtype)
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self.rows * self._row_bytes, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, self.dtype).reshape(shape)

    def read(self, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
        """Rows from each start on, so many, end to end. They are read and not mapped, so that they take no more memory
        than what is returned. Raises DataError where the file has become shorter.
        """
        total = int(counts.sum())
        rows = np.empty((total, self.width) if self.width > 1 else total, self.dtype)
        if not total:
            return rows
        into, at = rows.data.cast("B"), 0
        with self.path.open("rb") as file:
            number = file.fileno()
            offsets, sizes = (starts * self._row_bytes).tolist(), (counts * self._row_bytes).tolist()
            for offset, size in zip(offsets, sizes, strict=True):
                end = at + size
                while at < end:
                    found = os.preadv(number, [into[at:end]], offset)
                    if not found:
                        raise DataError(
                            f"{self.path}: ends at byte {offset}; expected {end - at} bytes more. "
                            "It was changed since it was written: run the same command again"
                        )
                    at, offset = at + found, offset + found
        return rows

    def release(self) -> None:
        """Let go of the memory that reading the map took: it stays readable, and what is read again is mapped again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
