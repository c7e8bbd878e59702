"""Compressed streams and archives: from the bytes of a file to parts that hold one corpus each.

What a stream is shows in its first bytes, never in its name. Nothing is ever written under a member's name: members
with `..` or absolute names are data like others. Links and devices in tar archives are no data; they are passed over,
and named.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Container, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa

from ismdata.convert.sources.file_names import (
    chosen,
    expected,
    is_corpus,
    is_dialogues,
    passed_over,
    printable,
    stem_of,
)
from ismdata.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Unpacked data beyond this that is also beyond `MAX_RATIO` times its packed size is refused as a zip bomb.
MAX_UNPACKED_BYTES = 2 << 30
MAX_RATIO = 200
#: Compressions one inside the other, as in a zip member that is a .gz file; more are taken for a bomb.
MAX_LAYERS = 4
#: What an xz decoder may allocate for its dictionary.
_XZ_MEMORY = 1 << 30

ZIP, EMPTY_ZIP, _PARQUET = b"PK\x03\x04", b"PK\x05\x06", b"PAR1"
_TAR_BLOCK = tarfile.BLOCKSIZE
_ROWS = 1000

#: What the decoders raise for data that is broken or cut off; OSError is what gzip, bz2 and Arrow's zstd use.
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, pa.ArrowInvalid)

Position = Callable[[], int]


class Watched(io.RawIOBase):
    """Bytes from `read`, under watch: reads are full, failures become DataErrors, bombs are found out.

    `packed` tells how many packed bytes were read so far; None for a stream that is not compressed.
    """

    def __init__(self, read: Callable[[int], bytes], name: str, packed: Position | None = None) -> None:
        self._read = read
        self._name = name
        self._packed = packed
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            try:
                chunk = self._read(len(view) - filled)
            except _BROKEN as error:
                raise unreadable(self._name, error) from error
            if not chunk:
                break
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        self.count += filled
        if self._packed is not None:
            refuse_bomb(self._name, self.count, self._packed())
        return filled


def refuse_bomb(name: str, unpacked: int, packed: int) -> None:
    """Raise DataError for data that unpacks beyond both limits."""
    if unpacked > MAX_UNPACKED_BYTES and unpacked > MAX_RATIO * packed:
        raise DataError(
            f"{name}: {packed:,} bytes unpack to {unpacked:,} or more, as in a zip bomb; expected at most "
            f"{MAX_UNPACKED_BYTES:,} bytes or {MAX_RATIO} times the packed size. Unpack it yourself if you trust it"
        )


def unreadable(name: str, error: Exception) -> DataError:
    """What is said of a stream that cannot be read on: the disk is at fault where the error has a number."""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{name}: cannot be read ({error.strerror}); expected a readable file")
    return DataError(
        f"{name}: the compressed data is broken or cut off ({error or type(error).__name__}). The download may be "
        "incomplete: get the file again"
    )


class _Streams:
    """Compressed streams one after the other, as bzip2 and xz files may hold, each to its end.

    The library's own file objects stop without a word at what is no further stream; here that is an error.
    """

    def __init__(
        self, source: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: bytes
    ) -> None:
        self._source, self._new, self._padding = source, new, padding
        self._decoder = new()
        self._fed = False  # whether the decoder has seen any byte of its stream

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data.lstrip(self._padding)
                while not rest:
                    more = self._source.read(io.DEFAULT_BUFFER_SIZE)
                    if not more:
                        return b""
                    rest = more.lstrip(self._padding)
                self._decoder = self._new()
            elif self._decoder.needs_input:
                rest = self._source.read(io.DEFAULT_BUFFER_SIZE)
                if not rest:
                    raise EOFError("it ends inside the compressed data")
            else:
                rest = b""
            data = self._decoder.decompress(rest, size)
            if data:
                return data


def _decoder(head: bytes, stream: BinaryIO) -> Callable[[int], bytes] | None:
    """How the stream that begins with `head` is unpacked, None where it is not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream).read
    if head.startswith(b"BZh") and head[3:4].isdigit():
        return _Streams(stream, bz2.BZ2Decompressor, b"").read
    if head.startswith(b"\xfd7zXZ\x00"):
        return _Streams(stream, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), b"\x00").read
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        unpacked = pa.CompressedInputStream(stream, "zstd")
        return lambda size: bytes(unpacked.read(size))
    return None


def unpacked(stream: io.BufferedReader, name: str, packed: Position) -> io.BufferedReader:
    """The plain bytes of a stream that may be compressed, once or more. Raises DataError, when it is read too."""
    for _ in range(MAX_LAYERS + 1):
        read = _decoder(stream.peek(6)[:6], stream)
        if read is None:
            return stream
        stream = io.BufferedReader(Watched(read, name, packed))
    raise DataError(f"{name}: compressed more than {MAX_LAYERS} times over, as in a zip bomb. Unpack it yourself")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus inside a source: the file itself, or a member of an archive. To be used before the next one is taken.

    `stream` holds its plain bytes, `position()` says how far the source's file has been read.
    """

    name: str
    stem: str
    stream: io.BufferedReader
    position: Position

    @property
    def is_parquet(self) -> bool:
        return self.stream.peek(4)[:4] == _PARQUET

    def tables(self) -> Iterator[pa.Table]:
        """The rows of a Parquet file, some at a time. Raises DataError."""
        import pyarrow.parquet

        # Parquet is read from its end: what can only be read forwards goes to a file that has no name.
        with seekable(self.stream) as stream:
            try:
                file = pyarrow.parquet.ParquetFile(stream)
                for batch in file.iter_batches(batch_size=_ROWS):
                    yield pa.Table.from_batches([batch])
            except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
                raise DataError(f"{self.name}: not a readable Parquet file ({error}). Get the file again") from error


@contextmanager
def seekable(stream: io.BufferedReader) -> Iterator[BinaryIO]:
    """The stream itself, left open, where it can be read in any order, else a copy of it in a temporary file."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.seek(0)
        yield copy


def parts_of(
    stream: io.BufferedReader,
    *,
    name: str,
    stem: str,
    position: Position,
    packed: Position,
    also: Container[str] = (),
) -> Generator[Part, None, list[str]]:
    """The parts of a stream that may be compressed, a tar or a zip archive. Returns the names that were not read.

    `packed` counts the packed bytes read so far, for the limit. `also` names members of a tar archive that are read
    whatever they are called. Raises NoCorpus where an archive has nothing to read, DataError while a part is read too.
    """
    plain = unpacked(stream, name, packed)
    head = plain.peek(_TAR_BLOCK)[:_TAR_BLOCK]
    if is_tar(head):
        return (yield from _tar_parts(plain, name=name, position=position, packed=packed, also=also))
    if head.startswith((ZIP, EMPTY_ZIP)):
        with seekable(plain) as file, opened_zip(file, name) as archive:
            members, others = zip_members(archive, name)
            for member in members:
                yield zip_part(archive, member, name=f"{name}!{printable(member.filename)}", position=position)
        return others
    yield Part(name=name, stem=stem, stream=plain, position=position)
    return []


class NoCorpus(DataError):
    """An archive in which no file is called like a corpus; `names` are the files it holds."""

    def __init__(self, archive: str, names: list[str]) -> None:
        held = ", ".join(map(printable, names[:5])) or "nothing"
        super().__init__(f"{archive}: the archive holds {held}; expected {expected()}. Unpack it and name the files")
        self.names = names


def is_tar(head: bytes) -> bool:
    """Whether a first block is that of a tar archive: its checksum fits, or it is the end of an empty one."""
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return len(head) == _TAR_BLOCK and not any(head)
    return True


class _Header(tarfile.TarInfo):
    """A header that is broken or missing is an error: `tarfile` takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) == _TAR_BLOCK and not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises what `tarfile` takes for the end, rightly here
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"found {error}, expected a member or the mark of the archive's end") from error


def _tar_parts(
    stream: io.BufferedReader, *, name: str, position: Position, packed: Position, also: Container[str]
) -> Generator[Part, None, list[str]]:
    """The corpora of a tar archive in one pass, in the archive's order; DailyDialog's texts are corpora too.

    Returns the names that were not read.
    """
    others: list[str] = []
    no_files: list[str] = []
    read = 0
    try:
        archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header)  # noqa: SIM115  # it holds nothing open
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # kept for links, which are not followed: a long archive costs no memory
            if member.isdir():
                continue
            if not member.isreg():
                no_files.append(f"{printable(member.name)} (no file)")
                continue
            if not (is_corpus(member.name) or is_dialogues(member.name) or member.name in also):
                others.append(member.name)
                continue
            place = f"{name}!{printable(member.name)}"
            content = archive.extractfile(member)
            if member.issparse() or content is None:
                raise DataError(f"{place}: a sparse file; expected a plain one. Unpack the archive and name its files")
            read += 1
            plain = unpacked(io.BufferedReader(Watched(content.read, place)), place, packed)
            yield Part(name=place, stem=stem_of(member.name), stream=plain, position=position)
        _expect_zeros(archive, name)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise unreadable(name, error) from error
    if not read:
        raise NoCorpus(name, others)
    return [*map(printable, passed_over(others, [])), *no_files]


def _expect_zeros(archive: tarfile.TarFile, name: str) -> None:
    """Read behind the end of a tar archive, where a compressed stream has its checksum. Raises DataError."""
    assert archive.fileobj is not None
    while rest := archive.fileobj.read(1 << 16):
        if any(rest):
            raise DataError(
                f"{name}: found data after the mark of the archive's end; expected nothing there. Two archives one "
                "after the other must be two files"
            )


def opened_zip(file: BinaryIO, name: str) -> zipfile.ZipFile:
    """Raises DataError for what is no zip archive."""
    # A damaged directory makes zipfile seek before the start (ValueError, OSError) or want a version it has not
    # (NotImplementedError), beside its own error.
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise DataError(f"{name}: not a readable zip archive ({error}). Get the file again") from error


def zip_members(archive: zipfile.ZipFile, name: str) -> tuple[list[zipfile.ZipInfo], list[str]]:
    """The members to read, and the names of the others. Raises DataError: none, encrypted ones, a bomb."""
    # A member without a name is a file: `is_dir` looks at the name's last character.
    entries = [entry for entry in archive.infolist() if not (entry.filename and entry.is_dir())]
    names = [entry.filename for entry in entries]
    picked = set(chosen(names))
    members = [entry for entry in entries if entry.filename in picked]
    if not members:
        raise NoCorpus(name, names)
    for entry in members:
        if entry.flag_bits & 1:
            found = f"{name}!{printable(entry.filename)}"
            raise DataError(f"{found}: encrypted; expected a member without a password. Unpack the archive")
    # Members may share their packed bytes, so they are counted together, against the size of the file.
    assert archive.fp is not None
    refuse_bomb(name, sum(entry.file_size for entry in members), archive.fp.seek(0, io.SEEK_END))
    return members, list(map(printable, passed_over(names, sorted(picked))))


def zip_part(archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, name: str, position: Position | None = None) -> Part:
    """One member of a zip archive, compressed inside or not. Raises DataError, while it is read too."""
    # zipfile says RuntimeError of passwords, NotImplementedError of rare methods, ValueError of offsets that cannot be.
    try:
        content = archive.open(member)
    except (*_BROKEN, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{name}: cannot be unpacked ({error}). Unpack the archive and name its files") from error
    watched = Watched(content.read, name, lambda: member.compress_size)
    plain = unpacked(io.BufferedReader(watched), name, lambda: member.compress_size)

    def reached() -> int:
        return member.header_offset + member.compress_size * watched.count // max(member.file_size, 1)

    return Part(name=name, stem=stem_of(member.filename), stream=plain, position=position or reached)
