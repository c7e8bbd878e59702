"""Column files: appended to, cut back after an interruption, read back as rows or as a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.data.column_file import ColumnFile
from ismdata.errors import DataError


@pytest.mark.parametrize(("dtype", "width"), [(np.int32, 1), (np.int32, 4), (np.uint8, 1), (np.float32, 1)])
@given(batches=st.lists(st.integers(0, 5)), keep=st.integers(0, 12))
def test_a_column_is_its_batches_end_to_end(
    dtype: Any, width: int, batches: list[int], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("columns") / "column"
    values = iter(range(10_000))
    parts = [
        np.array([[next(values) for _ in range(width)] for _ in range(n)], dtype).reshape(n, width) for n in batches
    ]
    parts = [part[:, 0] if width == 1 else part for part in parts]
    column = ColumnFile(path, dtype, width)
    for part in parts:
        column.append(part)
    column.close()
    expected = np.concatenate([np.empty((0, width) if width > 1 else 0, dtype), *parts])
    assert column.rows == len(expected)
    assert np.array_equal(column.map(), expected)
    assert column.map().shape == expected.shape
    draw = np.random.default_rng(keep)
    starts = draw.integers(0, len(expected) + 1, 4)
    counts = np.array([draw.integers(0, len(expected) - start + 1) for start in starts], np.int64)
    read = column.read(starts, counts)
    assert read.dtype == expected.dtype
    assert np.array_equal(
        read, np.concatenate([expected[start : start + count] for start, count in zip(starts, counts, strict=True)])
    )

    if keep > len(expected):
        with pytest.raises(DataError, match=r"column: \d+ bytes; expected at least \d+"):
            ColumnFile(path, dtype, width, keep=keep)
        assert path.stat().st_size == expected.nbytes
        return
    resumed = ColumnFile(path, dtype, width, keep=keep)
    resumed.append(expected[keep:][::-1])
    resumed.close()
    assert np.array_equal(resumed.map(), np.concatenate([expected[:keep], expected[keep:][::-1]]))


def test_a_column_takes_whole_rows_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 values; expected whole rows of 2"):
        ColumnFile(tmp_path / "column", np.int32, 2).append([1, 2, 3])


def test_a_column_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    column = ColumnFile(tmp_path / "column", np.int32, 2)
    column.append(np.arange(20).reshape(10, 2))
    column.close()
    (tmp_path / "column").write_bytes((tmp_path / "column").read_bytes()[:50])
    assert column.read(np.array([0, 5]), np.array([2, 1])).tolist() == [[0, 1], [2, 3], [10, 11]]
    with pytest.raises(DataError, match="ends at byte 50; expected 14 bytes more"):
        column.read(np.array([0, 6]), np.array([2, 2]))
