"""The types of source: files and members of zip archives, streams that are read once, datasets, converted folders."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from ismdata.convert.sources.archives import CheckedStream, NoCorpus, Part, parts_of, read_error, zip_part
from ismdata.convert.sources.file_names import printable, select_files, stem_of
from ismdata.data import ConvertedFolder

#: Rows per Arrow table of a saved dataset.
_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """A file, or one member of a zip archive.

    Attributes:
        name: The name in reports.
        path: The file that is read and hashed.
        unique_stem: Records without an id are named after it, if another source's file has the same name.
        member: The member of `archive` that is read; None: the file itself.
        archive: The open zip archive at `path`.
        from_folder: The file was found in a folder, not named by the user. If it is an archive without a corpus, or of
            no known format, it is skipped instead of refused.
        siblings: The archive has other members that are read: this one is skipped if it is of no known format.
        skipped: Files in the same folder or zip archive that are not read; the first source of these has them.
        split: The split that its name means; None if there is none.
        only: The splits of it that are read; None for all.
        held_out: True reads only its splits for measuring, False only the others, None all.
    """

    name: str
    path: Path
    unique_stem: str | None = None
    member: zipfile.ZipInfo | None = None
    archive: zipfile.ZipFile | None = field(default=None, repr=False, compare=False)
    from_folder: bool = False
    siblings: bool = False
    skipped: tuple[str, ...] = field(default=(), compare=False)
    split: str | None = None
    only: tuple[str, ...] | None = None
    held_out: bool | None = None

    #: Whether the source can be read only once, so that `bytes` and `sha256()` are known only after that.
    once = False

    @property
    def found(self) -> bool:
        """Whether the user named a folder or an archive rather than this file."""
        return self.from_folder or self.siblings

    @property
    def place(self) -> PurePosixPath:
        """The path of the file, continued by the path inside the archive."""
        return PurePosixPath(self.name.replace("!", "/"))

    @property
    def bytes(self) -> int:
        return self._stat().st_size

    def sha256(self) -> str:
        """The SHA-256 of the file; of the archive for a member. Raises DataError."""
        found = self._stat()
        return _sha256(self.path, self.name, found.st_size, found.st_mtime_ns)

    def identity(self) -> dict[str, Any]:
        """Name, size and time, which show without reading whether the file has changed. Raises DataError."""
        found = self._stat()
        return {"name": self.name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}

    def parts(self) -> Generator[Part, None, list[str]]:
        """The corpora in it, one at a time: the file itself, or the members of a tar archive.

        Returns the names of what was not read. Raises DataError.
        """
        try:
            return (yield from self._parts(()))
        except NoCorpus as error:
            # Texts are read if there is nothing else, which is known only at the end of a tar archive.
            texts = select_files(error.names)
            if texts:
                return (yield from self._parts(texts))
            if self.from_folder:
                return [self.name]
            raise

    def _parts(self, also: Container[str]) -> Generator[Part, None, list[str]]:
        if self.member is not None and self.archive is not None:
            member, size = zip_part(self.archive, self.member, name=self.name), self.member.compress_size
            return (
                yield from parts_of(
                    member.stream,
                    name=self.name,
                    stem=self.unique_stem or member.stem,
                    position=member.position,
                    packed=lambda: size,
                    also=also,
                )
            )
        with open_file(self.name, self.path) as file:
            stem = self.unique_stem or stem_of(self.path.name)
            position = file.tell
            return (yield from parts_of(file, name=self.name, stem=stem, position=position, packed=position, also=also))

    def _stat(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise read_error(self.name, error) from error


def open_file(name: str, path: Path) -> io.BufferedReader:
    """Open a file for reading bytes; `name` is its name in errors. Raises DataError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(name, error) from error


@lru_cache(maxsize=64)
def _sha256(path: Path, name: str, size: int, mtime_ns: int) -> str:
    """The hash of a file, cached for all members of an archive; size and time are part of the cache key."""
    digest = hashlib.sha256()
    with open_file(name, path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """Standard input or a named pipe: read once, from the first byte to the last."""

    name: str
    stem: str
    stream: BinaryIO = field(repr=False)
    skipped: tuple[str, ...] = field(default=(), compare=False)
    split: str | None = None
    only: tuple[str, ...] | None = None
    _digest: Any = field(default_factory=hashlib.sha256, repr=False, compare=False)
    _count: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)
    _ended: list[bool] = field(default_factory=list, repr=False, compare=False)

    once = True

    @property
    def bytes(self) -> int:
        """The number of bytes read so far."""
        return self._count[0]

    def sha256(self) -> str:
        """The SHA-256 of all bytes. Raises RuntimeError before `parts()` has been read to its end."""
        if not self._ended:
            raise RuntimeError(f"{self.name}: sha256() is known only after parts() has been read to its end")
        return str(self._digest.hexdigest())

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": None, "mtime_ns": None}

    def parts(self) -> Generator[Part, None, list[str]]:
        """As `FileSource.parts`, but only once. Raises DataError."""

        def position() -> int:
            return self.bytes

        checked = CheckedStream(self._read, self.name)
        stream: io.BufferedReader = io.BufferedReader(checked)
        skipped = yield from parts_of(stream, name=self.name, stem=self.stem, position=position, packed=position)
        while checked.read(1 << 20):  # the hash covers bytes that the parts did not need
            pass
        self._ended.append(True)
        return skipped

    def _read(self, size: int) -> Any:
        chunk = self.stream.read(size)
        self._digest.update(chunk)
        self._count[0] += len(chunk)
        return chunk


@dataclass(frozen=True, kw_only=True)
class SavedDataset:
    """A `datasets` dataset, or one split of it. `path` is its folder; None for one from the hub or in memory."""

    name: str
    stem: str
    path: Path | None
    dataset: Any
    skipped: tuple[str, ...] = field(default=(), compare=False)
    split: str | None = None
    only: tuple[str, ...] | None = None

    once = False

    @property
    def bytes(self) -> int:
        return int(self.dataset.data.nbytes)

    def sha256(self) -> str | None:
        """The SHA-256 of the names and hashes of the folder's data files; None if there is no folder."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        for source in self._files():
            digest.update(source.path.name.encode() + source.sha256().encode())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of its files, which show whether they have changed. Raises DataError."""
        if self.path is None:
            return {"name": self.name, "fingerprint": getattr(self.dataset, "_fingerprint", None)}
        return {"name": self.name, "files": [source.identity() for source in self._files()]}

    def _files(self) -> list[FileSource]:
        found = [] if self.path is None else sorted(self.path.rglob("*.arrow"))
        return [FileSource(name=printable(str(path)), path=path) for path in found]

    def tables(self) -> Iterator[pa.Table]:
        """The rows, as tables of at most 1,000."""
        yield from self.dataset.with_format("arrow").iter(batch_size=_ROWS)


@dataclass(frozen=True, kw_only=True)
class ConvertedSource:
    """A folder that `convert` wrote, or a part of one with splits: its conversations are taken as they are.

    Attributes:
        name: The folder.
        folder: Its shards.
        drawn: The folder is a part of a split that `--split` drew, not one that the corpus had.
    """

    name: str
    folder: ConvertedFolder = field(repr=False)
    drawn: bool = False
    skipped: tuple[str, ...] = field(default=(), compare=False)
    split: str | None = None
    only: tuple[str, ...] | None = None

    once = False

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.folder.files)

    def sha256(self) -> str:
        """The SHA-256 of the shards' hashes."""
        return self.folder.sha256

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256()}

    def tables(self) -> Iterator[pa.Table]:
        """The conversations, in batches of bounded size. Raises DataError."""
        yield from (pa.Table.from_batches([batch]) for batch in self.folder.batches())


Source = FileSource | StreamSource
AnySource = FileSource | StreamSource | SavedDataset | ConvertedSource
