"""index.json: what a folder holds, file by file, and how it is written and read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from ismdata.errors import DataError

INDEX_NAME = "index.json"

#: Format identifier of the index beside the parts of a split, each of them a converted folder.
SPLIT_FORMAT = "ismdata.split/1"

#: What readers of an index rely on.
_REQUIRED = {
    "ismdata.conversations": ("shards",),
    "ismdata.packed": ("shards", "seq_len", "mask", "weighted"),
}

#: Where an index's own hash will stand, and all that may follow it.
_UNSEALED = "0" * 64

_SEAL = re.compile(rb'"sha256": "[^"\n]{64}"\n}\n\Z')


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
