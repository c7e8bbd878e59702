"""Flat files of fixed-size rows: appended to, resumed after an interruption, read by rows or memory-mapped."""

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
    """A flat file of rows, each `width` values of one dtype: `append` to it, `close` it, then `map` or `read` it.

    Args:
        path: The file.
        dtype: The dtype of its values.
        width: Values per row.
        keep: Rows of an existing file to keep; later rows are cut off. With 0 the file starts empty.

    Attributes:
        rows: How many rows the file has.

    Raises:
        DataError: If the file has fewer than `keep` rows.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     column = ColumnFile(Path(folder) / "lengths", np.int32)
        ...     column.append([3, 5])
        ...     column.close()
        ...     column.read(np.array([1]), np.array([1])).tolist()
        [5]
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
        """Write rows: values of shape (n,), or (n, width) if width > 1."""
        rows = np.ascontiguousarray(values, self.dtype)
        if rows.size % self.width:
            raise ValueError(f"{self.path.name}: {rows.size} values; expected whole rows of {self.width}")
        self._file.write(rows.data)
        self.rows += rows.size // self.width

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish writing."""
        self._file.close()

    def map(self) -> NDArray[Any]:
        """All rows as a read-only memory map of shape (rows,), or (rows, width) if width > 1."""
        shape = (self.rows, self.width) if self.width > 1 else (self.rows,)
        if not self.rows:  # an empty file cannot be mapped
            return np.empty(shape, self.dtype)
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self.rows * self._row_bytes, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, self.dtype).reshape(shape)

    def read(self, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
        """Read the rows [start, start + count) for each start and count, int64[N] each, end to end.

        The file is not mapped for it, so that no memory but the result is used. Raises DataError if the file has become
        shorter.
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
                            "The file has changed since it was written: run the same command again"
                        )
                    at, offset = at + found, offset + found
        return rows

    def release(self) -> None:
        """Free the memory of the map's pages. The map stays valid; pages are read again when they are used."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
