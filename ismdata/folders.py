"""Output folders that are complete or absent, and the index files inside them.

A folder is written beside its final name, as `.NAME.partial`, and renamed last. Files in it are counted and hashed as
they are written, and the index names each with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ismdata.errors import DataError, UsageError

INDEX_NAME = "index.json"
QUARANTINE_NAME = "quarantine.jsonl"


#: What readers of an index rely on.
_REQUIRED = {
    "ismdata.conversations": ("shards",),
    "ismdata.packed": ("shards", "seq_len", "mask", "weighted"),
}


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of a folder as its index describes it."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def check_size(self, folder: Path) -> None:
        """Raise DataError unless the file is there and as long as the index says."""
        path = folder / self.name
        if not path.is_file():
            raise DataError(f"{path}: missing; {INDEX_NAME} lists it. Restore it or make the folder again")
        size = path.stat().st_size
        if size != self.bytes:
            raise DataError(f"{path}: {size} bytes; expected {self.bytes} ({INDEX_NAME}). Make the folder again")

    def check_hash(self, folder: Path) -> None:
        """Raise DataError unless the file's content has the SHA-256 of the index."""
        with (folder / self.name).open("rb") as file:
            found = (
                hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
            )
        if found != self.sha256:
            raise DataError(
                f"{folder / self.name}: SHA-256 is {found}; expected {self.sha256} ({INDEX_NAME}). "
                "The file has changed since it was written; make the folder again"
            )


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def describe_file(path: Path, rows: int) -> ShardFile:
    """Size and hash of a file that was just written."""
    with path.open("rb") as file:
        return ShardFile(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=_digest(file))


def read_index(folder: Path, expected_format: str) -> dict[str, Any]:
    """The index of a converted or packed folder. Raises DataError when it is absent, broken or of another format."""
    path = folder / INDEX_NAME
    command = "ismdata convert" if expected_format.startswith("ismdata.conversations") else "ismdata pack"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: found {found}; expected a folder that `{command}` wrote")
    if not path.is_file():
        raise DataError(f"{folder}: no {INDEX_NAME}; expected a folder that `{command}` wrote")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Make the folder again with `{command}`") from error
    found_format = index.get("format") if isinstance(index, dict) else None
    if found_format != expected_format:
        raise DataError(f"{path}: format is {found_format!r}; expected {expected_format!r}, which `{command}` writes")
    assert isinstance(index, dict)
    missing = [key for key in _REQUIRED[expected_format.partition("/")[0]] if key not in index]
    if missing:
        raise DataError(
            f"{path}: lacks {', '.join(missing)}; the file was changed. Make the folder again with `{command}`"
        )
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def entries(files: list[ShardFile]) -> list[dict[str, Any]]:
    return [asdict(file) for file in files]


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
    """Rename `partial` to `final`; an older `final` is set aside first and removed last, so that one of them is
    there.
    """
    aside = final.parent / f".{final.name}.replaced"
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        final.replace(aside)
    partial.replace(final)
    _sync_path(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


@contextmanager
def output_folder(
    final: Path, *, overwrite: bool, marker: str = INDEX_NAME, inputs: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """Yield a folder to write into; on success rename it to `final`, on any error remove it.

    Raises UsageError as `check_output` does, DataError when the disk is full or refuses. What an interrupted run left
    beside `final` is removed first.
    """
    check_output(final, overwrite=overwrite, marker=marker, inputs=inputs)
    partial = final.parent / f".{final.name}.partial"
    make_partial(partial, final)
    try:
        yield partial
        _sync(partial)
        put_in_place(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{final}: writing failed ({cause}). Nothing was kept; make room or name another output"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
