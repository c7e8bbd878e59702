"""Output folders that are complete or absent, written by one run at a time.

`open_output` writes a folder as `.NAME.partial` beside its final name and renames it last. While it does, it holds a
lock on `.NAME.lock`, which the system releases when the process ends. What an interrupted run leaves in `.NAME.partial`
is kept or removed as the command's `Leftovers` decide.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from ismdata.data.index import INDEX_NAME
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, Terminated, UsageError

QUARANTINE_NAME = "quarantine.jsonl"

#: In a partial folder only: the record of what is finished (journal.py), and files needed until the folder is complete.
JOURNAL_NAME = "journal.jsonl"
SCRATCH_NAME = "scratch"

#: Error numbers of flock on file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class Leftovers(Protocol):
    """What a command keeps of an unfinished output folder, so that its next run can resume."""

    def can_resume(self, partial: Path) -> bool:
        """Called at the start: whether this run may resume from `partial`. If not, `partial` is emptied first."""

    def keeps(self, partial: Path, error: BaseException) -> bool:
        """Called when the run ends with an error: whether to keep `partial` for the next run."""

    def describe(self, partial: Path) -> str:
        """Called when writing failed: a sentence that says what is left and what to do."""


class NoLeftovers:
    """Nothing is kept: each run starts from an empty folder."""

    def can_resume(self, partial: Path) -> bool:
        """Never."""
        return False

    def keeps(self, partial: Path, error: BaseException) -> bool:
        """Never."""
        return False

    def describe(self, partial: Path) -> str:
        """That nothing was kept."""
        return "Nothing was kept; make room or name another output"


class JournaledLeftovers(NoLeftovers):
    """For runs with a `Journal`, which decides whether to resume: a folder is kept if the process was killed or
    terminated, or if the run was refused before it changed the folder of an earlier one.
    """

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None

    def can_resume(self, partial: Path) -> bool:
        """If there is a folder; `Journal.open` empties it if it holds nothing to resume."""
        self._before = _stamp(partial / JOURNAL_NAME)
        return partial.is_dir()

    def keeps(self, partial: Path, error: BaseException) -> bool:
        """If the process was ended from outside, or the journal is as this run found it."""
        if not isinstance(error, (Exception, KeyboardInterrupt)):
            return True
        return self._before is not None and self._before == _stamp(partial / JOURNAL_NAME)


@contextmanager
def open_output(
    final: Path,
    *,
    overwrite: bool,
    marker: str = INDEX_NAME,
    inputs: Sequence[str | Path] = (),
    leftovers: Leftovers | None = None,
    reporter: Reporter = LOGGED,
) -> Iterator[Path]:
    """Yield a folder to write into. On success it is renamed to `final`, on an error it is removed.

    Args:
        final: The output folder.
        overwrite: Whether to replace an older output.
        marker: A file that each such output has. A folder without it holds something else and is never replaced.
        inputs: What the run reads; a folder that holds an input is never replaced.
        leftovers: What to keep of an unfinished folder; nothing by default.
        reporter: Receives a note if the file system has no locks.

    Yields:
        The folder `.NAME.partial`.

    Raises:
        UsageError: As `check_output` does, or if another run is writing the folder.
        DataError: If the disk is full or cannot be written.
    """
    leftovers = leftovers or NoLeftovers()
    final = _with_name(final)
    partial = partial_folder(final)
    with locked(final, reporter):
        _recover(partial, final)
        check_output(final, overwrite=overwrite, marker=marker, inputs=inputs)
        if not leftovers.can_resume(partial):
            _make_empty(partial, final)
        try:
            yield partial
            _sync(partial)
            put_in_place(partial, final)
        except BaseException as error:
            if not leftovers.keeps(partial, error):
                shutil.rmtree(partial, ignore_errors=True)
                _recover(partial, final)
            elif isinstance(error, Terminated):
                error.kept = partial
            if not isinstance(error, OSError):
                raise
            cause = os.strerror(error.errno) if error.errno else str(error)
            raise DataError(f"{final}: writing failed ({cause}). {leftovers.describe(partial)}") from error


def partial_folder(final: Path) -> Path:
    """Where an output folder is written until it is complete.

    Args:
        final: The output folder.

    Returns:
        `.NAME.partial` beside it.
    """
    return _beside(_with_name(final), "partial")


def _with_name(final: Path) -> Path:
    """The same folder by a path that ends in its name, which `.` and `..` do not."""
    return final.resolve() if final.name in ("", "..") else final


def check_output(final: Path, *, overwrite: bool, marker: str, inputs: Sequence[str | Path] = ()) -> None:
    """Check that a folder may be written to `final`: it is absent or empty, or an older output and `overwrite` is set.

    Args:
        final: The output folder.
        overwrite: Whether to replace an older output.
        marker: A file that each such output has. A folder without it holds something else and is never replaced.
        inputs: What the run reads. The current folder, its parents and folders that hold an input are never replaced.

    Raises:
        UsageError: If it may not.
    """
    if any("\ud800" <= character <= "\udfff" for character in str(final)):
        raise UsageError(f"{final}: is not UTF-8; expected a name that Arrow can open. Name another output")
    if final.exists() and not final.is_dir():
        raise UsageError(f"{final}: is a file; expected a folder to write into. Name another output")
    for source in inputs:
        if (Path(source) / "index.json").is_file() and Path(source).resolve() in final.resolve().parents:
            raise UsageError(f"{final}: lies inside the input {source}, which has an index of its files. Name another")
    if not final.exists() or not any(final.iterdir()):
        if final.exists() and (final.is_symlink() or Path.cwd().is_relative_to(final.resolve())):
            raise UsageError(
                f"{final}: is a link or the current folder; expected a new folder's name. Name another output"
            )
        return
    if not overwrite:
        raise UsageError(f"{final}: is in use; expected an empty or absent folder. Name another, or pass --overwrite")
    resolved = final.resolve()
    if final.is_symlink() or Path.cwd().is_relative_to(resolved):
        raise UsageError(
            f"{final}: is a link, the current folder or one above it; --overwrite does not replace those. "
            "Name another output"
        )
    if not (final / marker).is_file():
        raise UsageError(
            f"{final}: has no {marker}, so it is no output of this command; --overwrite does not replace it. Name "
            "another output"
        )
    for source in inputs:
        if Path(source).resolve().is_relative_to(resolved):
            raise UsageError(f"{final}: holds the input {source}; --overwrite does not replace it. Name another output")


def _make_empty(partial: Path, final: Path) -> None:
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{final}: cannot be written ({error.strerror}). Name another output folder") from error


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial`, without its journal and scratch files, to `final`.

    An older `final` is moved aside first and removed last, so that one of the two is complete at each moment.
    `_recover` repairs what a crash in between leaves.
    """
    for name in (SCRATCH_NAME, JOURNAL_NAME):
        if (partial / name).exists():
            _remove(_beside(final, name))
            (partial / name).replace(_beside(final, name))
    sync_path(partial)
    sync_path(final.parent)
    aside = _beside(final, "replaced")
    if final.exists():
        _remove(aside)
        final.replace(aside)
    partial.replace(final)
    sync_path(final.parent)
    for name in (JOURNAL_NAME, SCRATCH_NAME, "replaced"):
        _remove(_beside(final, name))


def _recover(partial: Path, final: Path) -> None:
    """Repair what a crash inside `put_in_place` left: undo it, or finish it if the new folder has its name already."""
    aside = _beside(final, "replaced")
    if not final.exists() and aside.exists():
        aside.replace(final)
    for name in (JOURNAL_NAME, SCRATCH_NAME):
        if partial.exists() and _beside(final, name).exists():
            _beside(final, name).replace(partial / name)
    for name in (JOURNAL_NAME, SCRATCH_NAME, "replaced"):
        _remove(_beside(final, name))


def _beside(final: Path, name: str) -> Path:
    return final.parent / f".{final.name}.{name}"


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """A value that changes whenever the file does; None if there is no file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sync(folder: Path) -> None:
    """Sync all files that the complete folder has. Journal and scratch files sync when they are recorded."""
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] not in (JOURNAL_NAME, SCRATCH_NAME):
            sync_path(path)
    sync_path(folder)


def reopen(path: Path, length: int) -> IO[bytes]:
    """Open a file of an interrupted run to append to its first `length` bytes; what follows them is cut off.

    Args:
        path: The file. It is created if `length` is 0.
        length: How many bytes the interrupted run had recorded.

    Returns:
        The open file, at its end.

    Raises:
        DataError: If the file is shorter than that.
    """
    found = path.stat().st_size if length and path.exists() else 0
    if found < length:
        raise DataError(
            f"{path}: {found} bytes; expected at least {length}, which the interrupted run had written. "
            "The file has changed since. The unfinished output is removed: run the same command again"
        )
    file = path.open("r+b" if length else "wb")
    file.truncate(length)
    file.seek(length)
    return file


def sync_path(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk (fsync).

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- the lock ----


@contextmanager
def locked(final: Path, reporter: Reporter = LOGGED) -> Iterator[None]:
    """Hold the lock of an output folder, whose parent folders are created if they are absent.

    Raises UsageError if another run holds it, DataError if nothing can be written there.
    """
    path = _beside(final, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, final, reporter)
    except OSError as error:
        raise DataError(f"{final}: cannot be written ({error.strerror}). Name another output folder") from error
    with file:
        try:
            yield
        finally:
            # Removed while it is held, so that nobody can lock a file that is about to be removed.
            path.unlink(missing_ok=True)


def _acquire(path: Path, final: Path, reporter: Reporter) -> IO[bytes]:
    """Lock the file at `path`, until it is closed. Raises UsageError if another process holds the lock."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                pid = file.read(32).decode(errors="replace").strip()
            by = f"process {pid}" if pid else "another process"
            raise UsageError(
                f"{final}: {by} is writing it; expected one run at a time. Wait for it, or name another output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            reporter.note(
                f"{final}: this file system has no locks ({error.strerror}). Make sure that no other run writes there"
            )
            return file
        if _is_at(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
            return file
        file.close()  # its former holder removed it between our opening and locking it


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
