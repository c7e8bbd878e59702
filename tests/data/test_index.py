"""The index: files hashed while they are written, and the check of its keys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.data.index import GrowingFile, ShardFile, describe_file, layout_faults


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_growing_file_is_hashed_whole(written: list[bytes], followed: list[bool]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.touch()
        growing = GrowingFile(path)
        for data, follow in zip(written, followed, strict=False):
            with path.open("ab") as file:
                file.write(data)
            if follow:
                growing.follow()
        whole = b"".join(written)
        expected = ShardFile(name="file", rows=3, bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())
        assert growing.describe(3) == describe_file(path, 3) == expected


FILE = {"name": "a", "rows": 1, "bytes": 2, "sha256": "x"}
LAYOUT: dict[str, Any] = {"seq_len": int, "weighted": bool, "totals": {"tokens": int}, "shards": [ShardFile]}
VALID: dict[str, Any] = {"seq_len": 128, "weighted": False, "totals": {"tokens": 0}, "shards": [FILE], "more": None}


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"seq_len": True}, ["seq_len is true; expected an integer of at least 0"]),
        ({"weighted": 0}, ["weighted is 0; expected true or false"]),
        ({"totals": {}}, ["totals.tokens is missing; expected an integer of at least 0"]),
        (
            {"shards": [FILE, {**FILE, "rows": "1"}], "seq_len": None},
            [
                "seq_len is null; expected an integer of at least 0",
                'shards[1] is {"name": "a", "rows": "1", "bytes": 2, "sha256": "x"}; '
                "expected name, rows, bytes and sha256 of a file",
            ],
        ),
    ],
)
def test_faults_of_an_index_name_place_found_and_expected(change: dict[str, Any], faults: list[str]) -> None:
    assert list(layout_faults(VALID | change, LAYOUT)) == faults
