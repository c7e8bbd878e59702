"""Output folders that are complete or absent, and the index files inside them.

A folder is written beside its final name, as `.NAME.partial`, and renamed last. Files in it are counted and hashed as
they are written, and the index names each with its size and SHA-256. Last in the index stands its own SHA-256, taken
with that hash as 64 zeros, so that a change anywhere in the folder shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from ismdata.data.lock import locked
from ismdata.errors import DataError, Terminated, UsageError

INDEX_NAME = "index.json"
#: Format identifier of the index beside the parts of a split, each of them a converted folder.
SPLIT_FORMAT = "ismdata.split/1"
QUARANTINE_NAME = "quarantine.jsonl"

#: In a folder that is being written: what of it is finished (see journal.py), and a folder of what is needed until
#: then. Neither is in the folder that comes of it.
JOURNAL_NAME = "journal.jsonl"
SCRATCH_NAME = "scratch"


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


class GrowingFile:
    """A file that someone writes, hashed as it grows: what is new is read while the system still holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._bytes = 0

    def follow(self) -> None:
        """Hash what was written since."""
        with self.path.open("rb") as file:
            file.seek(self._bytes)
            while chunk := file.read(1 << 20):
                self._digest.update(chunk)
                self._bytes += len(chunk)

    def describe(self, rows: int) -> ShardFile:
        """Size and hash of the file, now that it is complete."""
        self.follow()
        return ShardFile(name=self.path.name, rows=rows, bytes=self._bytes, sha256=self._digest.hexdigest())


def describe_file(path: Path, rows: int) -> ShardFile:
    """Size and hash of a file that was just written."""
    return GrowingFile(path).describe(rows)


def read_index(folder: Path, expected_format: str) -> dict[str, Any]:
    """The index of a converted or packed folder. Raises DataError when it is absent, broken or of another format."""
    path = folder / INDEX_NAME
    command = "ismdata convert" if expected_format.startswith("ismdata.conversations") else "ismdata pack"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: found {found}; expected a folder that `{command}` wrote")
    if not path.is_file():
        raise DataError(f"{folder}: no {INDEX_NAME}; expected a folder that `{command}` wrote")
    index = load_index(folder)
    found_format = index.get("format")
    if found_format == SPLIT_FORMAT and isinstance(index.get("parts"), dict):
        parts = " or ".join(str(folder / str(part)) for part in index["parts"])
        raise DataError(f"{folder}: holds the parts of a split; expected one folder of conversations. Name {parts}")
    if found_format != expected_format:
        raise DataError(f"{path}: format is {found_format!r}; expected {expected_format!r}, which `{command}` writes")
    missing = [key for key in _REQUIRED[expected_format.partition("/")[0]] if key not in index]
    if missing:
        raise DataError(
            f"{path}: lacks {', '.join(missing)}; the file was changed. Make the folder again with `{command}`"
        )
    _check_listed(path, index["shards"])
    return index


def load_index(folder: Path) -> dict[str, Any]:
    """The index of a folder, whatever it says, as long as it is what was written. Raises DataError."""
    path = folder / INDEX_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a folder that ismdata wrote. Make the folder again"
        ) from error
    try:
        index = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Make the folder again") from error
    if not isinstance(index, dict) or not index:
        found = "an empty object" if index == {} else type(index).__name__
        raise DataError(f"{path}: holds {found}; expected what ismdata writes. Make the folder again")
    if "sha256" not in index:
        raise DataError(
            f"{path}: holds no SHA-256 of itself; expected one as its last key. "
            "An older version of ismdata wrote it, or it was changed; make the folder again"
        )
    if sealed(data) != data:
        raise DataError(
            f"{path}: its own SHA-256 does not fit its content; expected both as they were written. "
            "The file has changed since; make the folder again"
        )
    return index


def _check_listed(path: Path, listed: Any) -> None:
    """Raise DataError unless an index lists files as `ShardFile` describes them, by names inside the folder."""
    kinds = {"name": str, "rows": int, "bytes": int, "sha256": str}
    for at, entry in enumerate(listed if isinstance(listed, list) else [listed]):
        fits = isinstance(entry, dict) and entry.keys() == kinds.keys()
        if not fits or not all(type(entry[name]) is kind and entry[name] >= kind() for name, kind in kinds.items()):
            raise DataError(
                f"{path}: shards[{at}] is {json.dumps(entry)[:80]}; expected name, rows, bytes and sha256 of a file. "
                "Make the folder again"
            )
        if leaves_folder(entry["name"]):
            raise DataError(
                f"{path}: lists {entry['name']!r}; expected a name inside the folder. Make the folder again"
            )


def leaves_folder(name: str) -> bool:
    """Whether a file's name in an index leads out of the folder, or to nothing at all."""
    path = PurePath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write `index.json`, its own SHA-256 last. Names that are not UTF-8 keep their bytes as `\\udcXX` escapes."""
    unsealed = {key: value for key, value in index.items() if key != "sha256"} | {"sha256": _UNSEALED}
    text = json.dumps(unsealed, indent=2, ensure_ascii=False) + "\n"
    (folder / INDEX_NAME).write_bytes(sealed(text.encode("utf-8", "backslashreplace")))


#: Where an index's own hash will stand, and all that may follow it.
_UNSEALED = "0" * 64
_SEAL = re.compile(rb'"sha256": "[^"\n]{64}"\n}\n\Z')


def sealed(data: bytes) -> bytes:
    """The bytes of an index with its own SHA-256 filled in: that of the same bytes with 64 zeros in its place.

    An index that is as it was written stays as it is. Nothing else does: what does not end in a hash comes back empty.
    """
    place = _SEAL.search(data, max(0, len(data) - 80))
    if place is None:
        return b""
    at = place.start() + len(b'"sha256": "')
    unsealed = data[:at] + _UNSEALED.encode() + data[at + 64 :]
    return data[:at] + hashlib.sha256(unsealed).hexdigest().encode() + data[at + 64 :]


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
def output_folder(
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


def sync_path(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
