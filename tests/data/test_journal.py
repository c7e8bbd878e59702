"""Columns, the journal and the lock: what a crash leaves is gone on with, or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.data import output_folder
from ismdata.data.column_file import ColumnFile
from ismdata.data.journal import Journal, run_difference
from ismdata.data.output_folder import JOURNAL_NAME, JournaledLeftovers, NoLeftovers, locked, open_output, put_in_place
from ismdata.errors import DataError, UsageError

RUN: dict[str, Any] = {
    "command": "convert",
    "version": "1",
    "sources": [{"name": "a.jsonl", "bytes": 120, "mtime_ns": 10**9}, {"name": "b.jsonl", "bytes": 7, "mtime_ns": 5}],
    "options": {"format": "auto", "seq_len": 256},
}


# ---- columns ----


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


def test_a_column_that_has_become_shorter_is_told(tmp_path: Path) -> None:
    column = ColumnFile(tmp_path / "column", np.int32, 2)
    column.append(np.arange(20).reshape(10, 2))
    column.close()
    (tmp_path / "column").write_bytes((tmp_path / "column").read_bytes()[:50])
    assert column.read(np.array([0, 5]), np.array([2, 1])).tolist() == [[0, 1], [2, 3], [10, 11]]
    with pytest.raises(DataError, match="ends at byte 50; expected 14 bytes more"):
        column.read(np.array([0, 6]), np.array([2, 2]))


# ---- the journal ----


def test_a_journal_says_where_it_was(tmp_path: Path) -> None:
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
    for _ in range(3):  # however often it is killed
        journal = Journal.open(tmp_path, RUN, restart=True)  # --overwrite goes on, too
        assert (journal.state, journal.finished) == ({"rows": 3}, [{"part": 0}, {"part": 1}])
        journal.close()


@pytest.mark.slow
def test_any_torn_end_is_as_if_it_had_not_been_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after every byte: the journal is that of the lines that are whole."""
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
        assert (tmp_path / "data").exists() == bool(lines)  # without a whole first line all is cleared
        again.record({"n": 4}, [])
        again.close()
        after = Journal.open(tmp_path, RUN, restart=False)
        assert (after.state, after.finished) == ({"n": 4}, again.finished)
        after.close()


@pytest.mark.parametrize("garbage", [b"", b"\n", b"\0" * 100, b"[1]\n", b'"x"\n', b"{\n", b"\xff\xfe\n"])
def test_what_is_no_journal_is_cleared(garbage: bytes, tmp_path: Path) -> None:
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


def test_of_many_differences_the_first_are_shown() -> None:
    former = {"options": {f"option_{k}": k for k in range(20)}}
    error = run_difference(former, {"options": {}}, name="out: the run")
    assert isinstance(error, UsageError)
    assert "--option-7 is not given and was 7; and 12 more differences. " in str(error)
    assert run_difference(former, former, name="out: the run") is None


def test_content_that_changed_is_told_in_words() -> None:
    former = {"data": "0" * 64, "options": {"seed": 0}}
    error = run_difference(former, {**former, "data": "1"}, name="x", content={"data": "the shards have changed"})
    assert isinstance(error, DataError)
    assert str(error).startswith("x differs from this one: the shards have changed. ")


def test_it_is_due_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ismdata.data.journal.time.monotonic", lambda: now)
    journal = Journal.open(tmp_path, RUN, restart=False)
    now += 5  # what is done before anything could be recorded
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


# ---- the lock ----


def test_the_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ismdata.data.output_folder import locked\n"
        "with locked(Path(sys.argv[1])):\n  print('held', flush=True); sys.stdin.read()"
    )
    final = tmp_path / "deep" / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(final)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"out: process {holder.pid} is writing it"), locked(final):
            pass
        with locked(tmp_path / "deep" / "other"):
            pass
        holder.kill()
    assert (final.parent / ".out.lock").exists()  # as a crash leaves it, and in nobody's way
    with locked(final), pytest.raises(UsageError, match=rf"process {os.getpid()}"), locked(final):
        pass
    assert list(final.parent.iterdir()) == []


def test_a_lock_that_its_holder_took_away_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes the file between our opening and our locking it."""
    path, flock, opened = tmp_path / ".out.lock", output_folder.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not opened:
            path.unlink()
        opened.append(handle)
        flock(handle, how)

    monkeypatch.setattr(output_folder.fcntl, "flock", late)
    with locked(tmp_path / "out"):
        assert len(opened) == 2
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(output_folder.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "flock", none)
    with locked(tmp_path / "out"):
        assert "out: this file system has no locks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- putting in place ----


class Death(BaseException):
    """The end of a process, as far as a test can have it inside its own."""


def _tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "old"])
def test_death_at_each_step_of_putting_in_place(
    before: str | None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step the old folder or the new one is whole somewhere, and the next run ends as if nothing had been."""
    for n in range(100):
        base = tmp_path_factory.mktemp("place")
        final = base / "out"
        if before:
            final.mkdir()
            (final / "index.json").write_text(before)
        calls = 0

        def counted(real: Any, limit: int = n) -> Any:
            def step(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                if calls == limit:
                    raise Death
                calls += 1
                return real(*arguments, **named)

            return step

        died = False
        with monkeypatch.context() as patch:
            try:
                with open_output(final, overwrite=True, leftovers=JournaledLeftovers()) as folder:
                    Journal.open(folder, RUN, restart=True).close()
                    (folder / "index.json").write_text("new")
                    for name in ("replace", "unlink"):
                        patch.setattr(Path, name, counted(getattr(Path, name)))
                    patch.setattr("ismdata.data.output_folder.shutil.rmtree", counted(_remove_tree))
                    patch.setattr("ismdata.data.output_folder.sync_path", counted(lambda path: None))
            except Death:
                died = True
        places = [final, base / ".out.partial", base / ".out.replaced"]
        kept = {text for place in places for name, text in _tree(place).items() if name == "index.json"}
        assert "new" in kept
        if before and not (final / "index.json").exists():
            assert "old" in kept
        resumed = not (final / "index.json").exists() or (final / "index.json").read_text() == "old"
        with open_output(final, overwrite=True, leftovers=JournaledLeftovers()) as folder:
            assert ((folder / "index.json").exists() and (folder / JOURNAL_NAME).exists()) == resumed
            if before and resumed:
                assert (final / "index.json").read_text() == "old"
            Journal.open(folder, RUN, restart=True).close()
            (folder / "index.json").write_text("new")
        assert _tree(base) == {"out/index.json": "new"}
        if not died:
            assert n > 5
            return
    pytest.fail("it never ended")


def _remove_tree(path: Path) -> None:
    """Without the patched methods."""
    subprocess.run(["rm", "-r", str(path)], check=True)


def test_an_older_output_set_aside_twice(tmp_path: Path) -> None:
    """What a crash while removing the older output left is in nobody's way."""
    for name in ("out", ".out.replaced", "partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(name)
    put_in_place(tmp_path / "partial", tmp_path / "out")
    assert _tree(tmp_path) == {"out/index.json": "partial"}


@pytest.mark.parametrize(
    ("error", "kept"), [(Death, True), (KeyboardInterrupt, False), (DataError, False), (OSError, False)]
)
def test_what_is_kept_after_each_end(error: type[BaseException], kept: bool, tmp_path: Path) -> None:
    for leftovers in (JournaledLeftovers, NoLeftovers):
        resumable = leftovers is JournaledLeftovers
        with (
            pytest.raises(DataError if error is OSError else error),
            open_output(tmp_path / "out", overwrite=False, leftovers=leftovers()) as folder,
        ):
            Journal.open(folder, RUN, restart=False).close()
            raise error
        assert (tmp_path / ".out.partial").exists() == (kept and resumable)
        assert not (tmp_path / ".out.lock").exists()
        if kept and resumable:  # a refusal leaves it alone, a run that takes over and fails does not
            with (
                pytest.raises(UsageError, match="--format is not given"),
                open_output(tmp_path / "out", overwrite=False, leftovers=JournaledLeftovers()) as folder,
            ):
                Journal.open(folder, {**RUN, "options": {}}, restart=False)
            with (
                pytest.raises(KeyboardInterrupt),
                open_output(tmp_path / "out", overwrite=False, leftovers=JournaledLeftovers()) as folder,
            ):
                raise KeyboardInterrupt
            assert (tmp_path / ".out.partial" / JOURNAL_NAME).exists()
            with (
                pytest.raises(DataError, match="broken"),
                open_output(tmp_path / "out", overwrite=False, leftovers=JournaledLeftovers()) as folder,
            ):
                Journal.open(folder, RUN, restart=False).close()
                raise DataError("broken")
            assert not (tmp_path / ".out.partial").exists()
