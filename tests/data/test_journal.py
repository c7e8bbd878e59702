"""The journal: what a run recorded is resumed after a crash; another run is refused with the differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ismdata.data.column_file import ColumnFile
from ismdata.data.journal import Journal, run_difference
from ismdata.data.output_folder import JOURNAL_NAME
from ismdata.errors import DataError, UsageError

RUN: dict[str, Any] = {
    "command": "convert",
    "version": "1",
    "sources": [{"name": "a.jsonl", "bytes": 120, "mtime_ns": 10**9}, {"name": "b.jsonl", "bytes": 7, "mtime_ns": 5}],
    "options": {"format": "auto", "seq_len": 256},
}


def test_a_journal_returns_what_was_recorded(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, RUN, restart=False)
    assert (journal.state, journal.finished) == (None, [])
    column = ColumnFile(tmp_path / "column", np.int32)
    column.append([1, 2])
    part = tmp_path / "part"
    part.write_text("part")
    with (tmp_path / "lines").open("wb") as lines:
        lines.write(b"line\n")
        journal.record({"rows": 2}, [column, lines])
        assert (tmp_path / "lines").read_bytes() == b"line\n"  # flushed before it was recorded
        assert (tmp_path / "column").stat().st_size == 8
        journal.finish({"part": 0}, [part])
        journal.record({"rows": 3}, [])
        journal.finish({"part": 1}, [part])
    journal.close()
    for _ in range(3):  # after any number of kills
        journal = Journal.open(tmp_path, RUN, restart=True)  # --overwrite resumes, too
        assert (journal.state, journal.finished) == ({"rows": 3}, [{"part": 0}, {"part": 1}])
        journal.close()


@pytest.mark.slow
def test_an_incomplete_last_line_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after every byte: the complete lines count."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    journal = Journal.open(tmp_path, RUN, restart=False)
    journal.record({"text": 'ü " \n', "n": 1}, [])
    journal.finish({"n": 2}, [])
    journal.record({"n": 3}, [])
    journal.close()
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = [json.loads(line) for line in whole[:cut].split(b"\n")[:-1]]
        states = [line["state"] for line in lines if "state" in line]
        (tmp_path / "data").write_text("of the run")
        again = Journal.open(tmp_path, RUN, restart=False)
        assert again.state == (states[-1] if states else None)
        assert again.finished == [line["finished"] for line in lines if "finished" in line]
        assert (tmp_path / "data").exists() == bool(lines)  # without a complete first line the folder is emptied
        again.record({"n": 4}, [])
        again.close()
        after = Journal.open(tmp_path, RUN, restart=False)
        assert (after.state, after.finished) == ({"n": 4}, again.finished)
        after.close()


@pytest.mark.parametrize("garbage", [b"", b"\n", b"\0" * 100, b"[1]\n", b'"x"\n', b"{\n", b"\xff\xfe\n"])
def test_a_folder_without_a_valid_journal_is_emptied(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(garbage)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "ids").write_text("old")
    (tmp_path / "shard").write_text("old")
    journal = Journal.open(tmp_path, RUN, restart=False)
    assert (journal.state, journal.finished) == (None, [])
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_NAME]
    journal.close()


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        (
            {"sources": [{"name": "a.jsonl", "bytes": 130, "mtime_ns": 2 * 10**9}, RUN["sources"][1]]},
            DataError,
            ["a.jsonl has changed: it is 130 bytes, written at ", ", and was 120 bytes, written at"],
        ),
        ({"sources": RUN["sources"][:1]}, UsageError, ["b.jsonl is not given now"]),
        ({"sources": [*RUN["sources"], {"name": "c"}]}, UsageError, ["c was not given then"]),
        ({"sources": RUN["sources"][::-1]}, UsageError, ["another order"]),
        ({"options": {"format": "auto", "seq_len": 512}}, UsageError, ["--seq-len is 512 and was 256"]),
        ({"options": {"format": "auto"}}, UsageError, ["--seq-len is not given and was 256"]),
        ({"version": "2"}, UsageError, ["the version is 2 and was 1"]),
        ({"command": "pack"}, UsageError, ["the command is pack and was convert"]),
        (
            {"sources": [{"name": "a.jsonl", "bytes": 1}, RUN["sources"][1]], "options": {"seq_len": 1, "format": "x"}},
            UsageError,
            ["a.jsonl has changed: it is 1 bytes", "; --seq-len is 1 and was 256; --format is x and was auto. "],
        ),
    ],
    ids=["content", "fewer", "more", "order", "option", "option-gone", "version", "command", "several"],
)
def test_another_run_is_refused_by_what_differs(
    change: dict[str, Any], error: type[Exception], parts: list[str], tmp_path: Path
) -> None:
    journal = Journal.open(tmp_path, RUN, restart=False)
    journal.record({"n": 1}, [])
    journal.close()
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    with pytest.raises(error) as caught:
        Journal.open(tmp_path, {**RUN, **change}, restart=False)
    for part in [
        "the interrupted run differs from this one: ",
        *parts,
        "Give the same files and options",
        "--overwrite",
    ]:
        assert part in str(caught.value)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    other = Journal.open(tmp_path, {**RUN, **change}, restart=True)
    assert other.state is None
    other.close()


def test_a_run_of_a_version_with_other_states_is_refused(tmp_path: Path) -> None:
    Journal.open(tmp_path, RUN, restart=False).close()
    path = tmp_path / JOURNAL_NAME
    first, *rest = path.read_text().splitlines(keepends=True)
    former = json.loads(first)
    del former["journal_version"]  # the first version did not record it
    path.write_text("".join([json.dumps(former) + "\n", *rest]))
    with pytest.raises(UsageError, match="the interrupted run differs from this one: the journal version is 3"):
        Journal.open(tmp_path, RUN, restart=False)


def test_of_many_differences_the_first_are_shown() -> None:
    former = {"options": {f"option_{k}": k for k in range(20)}}
    error = run_difference(former, {"options": {}}, name="out: the run")
    assert isinstance(error, UsageError)
    assert "--option-7 is not given and was 7; and 12 more differences. " in str(error)
    assert run_difference(former, former, name="out: the run") is None


def test_changed_content_is_described_in_words() -> None:
    former = {"data": "0" * 64, "options": {"seed": 0}}
    error = run_difference(former, {**former, "data": "1"}, name="x", content={"data": "the shards have changed"})
    assert isinstance(error, DataError)
    assert str(error).startswith("x differs from this one: the shards have changed. ")


def test_it_is_due_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ismdata.data.journal.time.monotonic", lambda: now)
    journal = Journal.open(tmp_path, RUN, restart=False)
    now += 5  # time before the first call of due()
    assert not journal.due()
    now += 0.5
    assert not journal.due()
    now += 1
    assert journal.due()
    journal.record({}, [])
    assert not journal.due()

    def slow(handle: int) -> None:
        nonlocal now
        now += 3

    monkeypatch.setattr("ismdata.data.journal.os.fsync", slow)
    journal.record({}, [])  # three seconds: a minute until the next
    now += 55
    assert not journal.due()
    now += 10
    assert journal.due()
    journal.close()
