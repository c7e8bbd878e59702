"""Output folders: one run at a time, complete or absent, and what an interrupted run leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ismdata.data import output_folder
from ismdata.data.journal import Journal
from ismdata.data.output_folder import (
    JOURNAL_NAME,
    JournaledLeftovers,
    NoLeftovers,
    locked,
    open_output,
    put_in_place,
)
from ismdata.errors import DataError, UsageError
from tests.support.reporters import Recorder

RUN: dict[str, Any] = {"command": "convert", "options": {"format": "auto"}}


# ---- the lock ----


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path) -> None:
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
    assert (final.parent / ".out.lock").exists()  # left by the kill, and no obstacle
    with locked(final), pytest.raises(UsageError, match=rf"process {os.getpid()}"), locked(final):
        pass
    assert list(final.parent.iterdir()) == []


def test_a_lock_file_removed_by_its_holder_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(output_folder.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "flock", none)
    recorder = Recorder()
    with open_output(tmp_path / "out", overwrite=False, reporter=recorder) as folder:
        assert [note.partition(" (")[0] for note in recorder.notes] == [
            f"{tmp_path / 'out'}: this file system has no locks"
        ]
        (folder / "index.json").touch()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


# ---- renaming the complete folder ----


class Death(BaseException):
    """Stands for the end of the process."""


def _tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "old"])
def test_death_at_each_step_of_the_renaming(
    before: str | None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step the old or the new folder is complete somewhere, and the next run ends as after no crash."""
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
    """Remove a folder without the patched methods."""
    subprocess.run(["rm", "-r", str(path)], check=True)


def test_an_older_output_set_aside_twice(tmp_path: Path) -> None:
    """What a crash left while it removed the older output is no obstacle."""
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
        if kept and resumable:  # a refused run leaves it as it is; a run that resumes it and fails removes it
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
