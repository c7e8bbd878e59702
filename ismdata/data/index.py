"""`index.json`: the files of a folder with their sizes and SHA-256, and what the folder holds.

The last key of an index is its own SHA-256, computed with 64 zeros in its place, so that a change anywhere in the
folder shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from ismdata.data.wrong_folder import next_step
from ismdata.errors import DataError

INDEX_NAME = "index.json"

#: Format identifier of the index of a folder of splits, each of which is a converted folder.
SPLIT_FORMAT = "ismdata.split/1"
#: The same where each is a packed folder.
PACKED_SPLIT_FORMAT = "ismdata.packed_split/1"

#: Stands for an index's own SHA-256 while that is computed.
_NO_HASH = "0" * 64

#: The end of each index.
_OWN_HASH = re.compile(rb'"sha256": "[^"\n]{64}"\n}\n\Z')

#: Stands for the value of a key that is not there.
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of a folder as its index lists it.

    Attributes:
        name: Its path inside the folder.
        rows: Rows of a shard, lines of a quarantine, 0 for other files.
        bytes: Its size.
        sha256: The SHA-256 of its content.
    """

    name: str
    rows: int
    bytes: int
    sha256: str

    def check_size(self, folder: Path) -> None:
        """Raise DataError unless the file is there and has its size."""
        path = folder / self.name
        if not path.is_file():
            raise DataError(f"{path}: missing; {INDEX_NAME} lists it. Restore it or make the folder again")
        size = path.stat().st_size
        if size != self.bytes:
            raise DataError(f"{path}: {size} bytes; expected {self.bytes} ({INDEX_NAME}). Make the folder again")

    def check_hash(self, folder: Path) -> None:
        """Raise DataError unless the file's content has its SHA-256."""
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
    """Computes the SHA-256 of a file while it is written, so that its pages are still in the system's cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._bytes = 0

    def follow(self) -> None:
        """Hash what was written since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._bytes)
            while chunk := file.read(1 << 20):
                self._digest.update(chunk)
                self._bytes += len(chunk)

    def describe(self, rows: int) -> ShardFile:
        """The entry of the file, which must be complete and has `rows` rows."""
        self.follow()
        return ShardFile(name=self.path.name, rows=rows, bytes=self._bytes, sha256=self._digest.hexdigest())


def describe_file(path: Path, rows: int) -> ShardFile:
    """Read a complete file and compute its entry for an index.

    Args:
        path: The file.
        rows: How many rows it has.

    Returns:
        Its name, rows, size and SHA-256.
    """
    return GrowingFile(path).describe(rows)


def entries(files: list[ShardFile]) -> list[dict[str, Any]]:
    """Files as an index lists them.

    Args:
        files: The files, in order.

    Returns:
        One JSON object per file.
    """
    return [asdict(file) for file in files]


#: What readers of a folder need of its index, by format without version, as `layout_faults` takes it.
_NEEDED: dict[str, Any] = {
    "ismdata.conversations": {"shards": [ShardFile]},
    "ismdata.packed": {"shards": [ShardFile], "seq_len": int, "mask": str, "weighted": bool},
}

_TYPE_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer of at least 0",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    ShardFile: "name, rows, bytes and sha256 of a file",
}


def read_index(folder: Path, expected_format: str) -> dict[str, Any]:
    """Read the index of a converted or packed folder.

    Args:
        folder: The folder.
        expected_format: The format that its index must have.

    Returns:
        The index. Keys that readers need are there and have their types, and `shards` lists files inside the folder.

    Raises:
        DataError: If the index is absent, broken, changed, or of another format.
    """
    path = folder / INDEX_NAME
    packed = not expected_format.startswith("ismdata.conversations")
    command = "ismdata pack" if packed else "ismdata convert"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(
            f"{folder}: found {found}; expected a folder that `{command}` wrote.{next_step(folder, packed=packed)}"
        )
    if not path.is_file():
        raise DataError(
            f"{folder}: no {INDEX_NAME}; expected a folder that `{command}` wrote.{next_step(folder, packed=packed)}"
        )
    index = load_index(folder)
    found_format = index.get("format")
    if found_format == (PACKED_SPLIT_FORMAT if packed else SPLIT_FORMAT):
        first, *others = [str(folder / name) for name in part_names(folder)]
        what = "sequences" if packed else "conversations"
        measured = f" (`ismdata train {first} --eval {others[0]}`)" if packed and others else ""
        raise DataError(
            f"{folder}: holds splits; expected one folder of {what}. Name {' or '.join([first, *others])}{measured}"
        )
    if found_format != expected_format:
        raise DataError(
            f"{path}: format is {found_format!r}; expected {expected_format!r}, which `{command}` writes."
            f"{next_step(folder, packed=packed)}"
        )
    fault = next(layout_faults(index, _NEEDED[expected_format.partition("/")[0]]), None)
    if fault is not None:
        raise DataError(f"{path}: {fault}. Make the folder again with `{command}`")
    for entry in index["shards"]:
        if leaves_folder(entry["name"]):
            raise DataError(
                f"{path}: lists {entry['name']!r}; expected a name inside the folder. Make the folder again"
            )
    return index


def part_names(folder: Path) -> list[str]:
    """The folders inside a folder of splits, in order.

    Args:
        folder: A folder whose index has the format SPLIT_FORMAT or PACKED_SPLIT_FORMAT.

    Returns:
        Their names.

    Raises:
        DataError: If the index is broken, or does not list folders inside it.
    """
    parts = load_index(folder).get("parts")
    if not isinstance(parts, dict) or not parts or any(leaves_folder(name) for name in parts):
        raise DataError(f"{folder / INDEX_NAME}: parts is {json.dumps(parts)[:80]}; expected the folders of splits")
    return list(parts)


def load_index(folder: Path) -> dict[str, Any]:
    """Read the index of any folder, and check it against its own SHA-256.

    Args:
        folder: The folder.

    Returns:
        The index, whatever keys it has.

    Raises:
        DataError: If the index is absent, broken or changed.
    """
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
        raise DataError(f"{path}: holds {found}; expected an index that ismdata wrote. Make the folder again")
    if "sha256" not in index:
        raise DataError(
            f"{path}: has no SHA-256 of its own; expected one as its last key. "
            "An older version of ismdata wrote it, or it has changed; make the folder again"
        )
    if with_own_hash(data) != data:
        raise DataError(
            f"{path}: its own SHA-256 does not match its content; expected the index as it was written. "
            "The file has changed since; make the folder again"
        )
    return index


def layout_faults(value: Any, layout: Any, place: str = "") -> Iterator[str]:
    """Yield one sentence per part of an index that is missing or has another type than `layout` says.

    Args:
        value: The index, or a part of it.
        layout: A type; or a dict with the layouts of keys that must be there; or a list with the layout of all items.
        place: Where the part is in the index, such as `totals.tokens`.
    """
    kind = layout if isinstance(layout, type) else type(layout)
    if kind is ShardFile:
        types = {"name": str, "rows": int, "bytes": int, "sha256": str}
        fits = isinstance(value, dict) and value.keys() == types.keys() and not [*layout_faults(value, types)]
    elif kind is int:
        fits = type(value) is int and value >= 0
    else:
        fits = isinstance(value, kind)
    if not fits:
        found = "missing" if value is _ABSENT else json.dumps(value)[:80]
        yield f"{place or 'the index'} is {found}; expected {_TYPE_NAMES[kind]}"
    elif isinstance(layout, dict):
        for key, inner in layout.items():
            yield from layout_faults(value.get(key, _ABSENT), inner, f"{place}.{key}".lstrip("."))
    elif isinstance(layout, list):
        for number, item in enumerate(value):
            yield from layout_faults(item, layout[0], f"{place}[{number}]")


def leaves_folder(name: str) -> bool:
    """Whether a file name in an index is empty or leads out of the folder."""
    path = PurePath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write `index.json` with its own SHA-256 as the last key.

    Args:
        folder: The folder, which must be complete.
        index: What to write. Names that are not UTF-8 keep their bytes as `\\udcXX` escapes.
    """
    content = {key: value for key, value in index.items() if key != "sha256"} | {"sha256": _NO_HASH}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / INDEX_NAME).write_bytes(with_own_hash(text.encode("utf-8", "backslashreplace")))


def with_own_hash(data: bytes) -> bytes:
    """The bytes of an index with its own SHA-256: that of the same bytes with 64 zeros in its place.

    An unchanged index stays as it is. The result is empty if the bytes do not end like an index.
    """
    found = _OWN_HASH.search(data, max(0, len(data) - 80))
    if found is None:
        return b""
    at = found.start() + len(b'"sha256": "')
    unhashed = data[:at] + _NO_HASH.encode() + data[at + 64 :]
    return data[:at] + hashlib.sha256(unhashed).hexdigest().encode() + data[at + 64 :]
