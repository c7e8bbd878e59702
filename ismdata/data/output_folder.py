"""Output folders that are complete or absent, and the index files inside them.

A folder is written beside its final name, as `.NAME.partial`, and renamed last. Files in it are counted and hashed as
they are written, and the index names each with its size and SHA-256. Last in the index stands its own SHA-256, taken
with that hash as 64 zeros, so that a change anywhere in the folder shows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ismdata.data.index import INDEX_NAME
from ismdata.data.lock import locked
from ismdata.errors import DataError, Terminated, UsageError

QUARANTINE_NAME = "quarantine.jsonl"

#: In a folder that is being written: what of it is finished (see journal.py), and a folder of what is needed until
#: then. Neither is in the folder that comes of it.
JOURNAL_NAME = "journal.jsonl"
SCRATCH_NAME = "scratch"


def check_output(final: Path, *, overwrite: bool, marker: str, inputs: Sequence[str | Path] = ()) -> None:
    """Raise UsageError unless a folder may be written to `final`: an absent or empty one, or with `overwrite` an older
    output.

    marker: a file that such an output has; a folder without it holds something else and is never replaced. Neither is
    the current folder, one above it, or one that holds an input.
    """
    if final.exists() and not final.is_dir():
        raise UsageError(f"{final}: is a file; expected a folder to write into. Name another output")
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
        raise UsageError(f"{final}: is a link, the current folder or one above it; --overwrite does not replace those")
    if not (final / marker).is_file():
        raise UsageError(
            f"{final}: has no {marker}, so it is no output of this command; --overwrite does not replace it"
        )
    for source in inputs:
        if Path(source).resolve().is_relative_to(resolved):
            raise UsageError(f"{final}: holds the input {source}; --overwrite does not replace it. Name another output")


def make_partial(partial: Path, final: Path) -> None:
    """An empty folder `partial`, to be renamed to `final`; what is there is removed. Raises DataError."""
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{final}: cannot be written ({error.strerror}). Name another output folder") from error


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial`, without journal and scratch, to `final`; an older `final` is set aside first and removed last,
    so that one of them is there. What a crash leaves in between, the next run puts right.
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
    """Put right what a crash inside `put_in_place` left: all of it is taken back, or what is left of it is done."""
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
    """Remove a file, or a folder and all in it, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def open_output(
    final: Path,
    *,
    overwrite: bool,
    marker: str = INDEX_NAME,
    inputs: Sequence[str | Path] = (),
    resumable: bool = False,
) -> Iterator[Path]:
    """Yield a folder to write into; on success rename it to `final`, on any error remove it.

    resumable: what a run left that was killed or terminated is kept, for `Journal.open` to say whether this run goes on
    with it; a run that is refused leaves it as it is. Otherwise it is removed first.

    Raises UsageError as `check_output` does and where another run writes there, DataError when the disk is full or
    refuses.
    """
    if final.name in ("", ".."):  # nothing can be written beside a name that is none
        final = final.resolve()
    partial = final.parent / f".{final.name}.partial"
    with locked(final):
        _recover(partial, final)
        check_output(final, overwrite=overwrite, marker=marker, inputs=inputs)
        if not (resumable and partial.is_dir()):
            make_partial(partial, final)
        before = _stamp(partial / JOURNAL_NAME)
        try:
            yield partial
            _sync(partial)
            put_in_place(partial, final)
        except BaseException as error:
            # An end from outside is like a crash; a run that was refused has not touched what another one left.
            if resumable and not isinstance(error, (Exception, KeyboardInterrupt)):
                if isinstance(error, Terminated):
                    error.kept = partial
                raise
            if before is None or before != _stamp(partial / JOURNAL_NAME):
                shutil.rmtree(partial, ignore_errors=True)
                _recover(partial, final)
            if not isinstance(error, OSError):
                raise
            cause = os.strerror(error.errno) if error.errno else str(error)
            raise DataError(
                f"{final}: writing failed ({cause}). Nothing was kept; make room or name another output"
            ) from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sync(folder: Path) -> None:
    """Return when all that stays in the folder is on the disk; journal and scratch go, and are when they must be."""
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
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
