"""Compressed streams and archives: from the bytes of a file to parts that hold one corpus each.

The first bytes of a stream decide what it is, never its name. Nothing is ever written under a member's name, so members
with `..` or absolute names are harmless. Links and devices in tar archives are skipped and reported.
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

from ismdata.convert.sources import file_names
from ismdata.convert.sources.file_names import is_corpus, is_dialogues, printable, stem_of
from ismdata.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Data that unpacks to more than this, and to more than `MAX_RATIO` times its packed size, is refused as a zip bomb.
MAX_UNPACKED_BYTES = 2 << 30
MAX_RATIO = 200
#: Nested compressions, as in a zip member that is a .gz file; more are refused as a zip bomb.
MAX_LAYERS = 4
#: Memory that an xz decoder may allocate for its dictionary, in bytes.
_XZ_MEMORY = 1 << 30

ZIP, EMPTY_ZIP, _PARQUET = b"PK\x03\x04", b"PK\x05\x06", b"PAR1"
_TAR_BLOCK = tarfile.BLOCKSIZE
_ROWS = 1000

#: What the decoders raise for broken or truncated data; gzip, bz2 and Arrow's zstd raise OSError.
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, pa.ArrowInvalid)

Position = Callable[[], int]


class CheckedStream(io.RawIOBase):
    """A stream over `read` that fills each buffer, raises DataError for any failure, and refuses zip bombs.

    `packed` returns the number of packed bytes read so far; None for a stream that is not compressed. `release` is
    called when the stream is closed.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        name: str,
        packed: Position | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._read = read
        self._name = name
        self._packed = packed
        self._release = release
        self.count = 0

    def close(self) -> None:
        if self._release is not None and not self.closed:
            self._release()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            try:
                chunk = self._read(len(view) - filled)
            except _BROKEN as error:
                raise read_error(self._name, error) from error
            if not chunk:
                break
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        self.count += filled
        if self._packed is not None:
            refuse_bomb(self._name, self.count, self._packed())
        return filled


def refuse_bomb(name: str, unpacked: int, packed: int) -> None:
    """Raise DataError if data unpacks beyond both limits."""
    if unpacked > MAX_UNPACKED_BYTES and unpacked > MAX_RATIO * packed:
        raise DataError(
            f"{name}: {packed:,} bytes unpack to {unpacked:,} or more, as in a zip bomb; expected at most "
            f"{MAX_UNPACKED_BYTES:,} bytes or {MAX_RATIO} times the packed size. Unpack it yourself if you trust it"
        )


def read_error(name: str, error: Exception) -> DataError:
    """The error for a stream that cannot be read: of the operating system if `error` has a number, else of the data."""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{name}: cannot be read ({error.strerror}); expected a readable file")
    return DataError(
        f"{name}: found broken or truncated data ({error or type(error).__name__}); expected a complete file. "
        "The download may be incomplete: get the file again"
    )


class _ConcatenatedStreams:
    """Concatenated compressed streams, as bzip2 and xz files may hold, each read to its end.

    The library's own file objects silently stop at data that is no further stream; here that is an error.
    """

    def __init__(
        self, source: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: bytes
    ) -> None:
        self._source, self._new, self._padding = source, new, padding
        self._decoder = new()

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
                    raise EOFError("the file ends inside the compressed data")
            else:
                rest = b""
            data = self._decoder.decompress(rest, size)
            if data:
                return data


def _decoder(head: bytes, stream: BinaryIO) -> Callable[[int], bytes] | None:
    """The function that reads decompressed bytes of a stream that begins with `head`; None if it is not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream).read
    if head.startswith(b"BZh") and head[3:4].isdigit():
        return _ConcatenatedStreams(stream, bz2.BZ2Decompressor, b"").read
    if head.startswith(b"\xfd7zXZ\x00"):
        return _ConcatenatedStreams(stream, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), b"\x00").read
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        decompressed = pa.CompressedInputStream(stream, "zstd")
        return lambda size: bytes(decompressed.read(size))
    return None


def decompress(stream: io.BufferedReader, name: str, packed: Position) -> io.BufferedReader:
    """The plain bytes of a stream that may be compressed, several times too. Raises DataError, also while reading."""
    for _ in range(MAX_LAYERS + 1):
        read = _decoder(stream.peek(6)[:6], stream)
        if read is None:
            return stream
        stream = io.BufferedReader(CheckedStream(read, name, packed))
    raise DataError(
        f"{name}: found more than {MAX_LAYERS} nested compressions, as in a zip bomb; expected fewer. Unpack the file"
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus in a source: the file itself, or a member of an archive. Valid until the next part is taken.

    Attributes:
        name: The name in reports.
        stem: Records without an id are named after it.
        stream: The plain bytes.
        position: Returns how many bytes of the source's file have been read.
    """

    name: str
    stem: str
    stream: io.BufferedReader
    position: Position

    @property
    def is_parquet(self) -> bool:
        return self.stream.peek(4)[:4] == _PARQUET

    def tables(self) -> Iterator[pa.Table]:
        """The rows of a Parquet file, as tables of at most 1,000. Raises DataError."""
        import pyarrow.parquet

        # Parquet is read from its end, so a stream that cannot seek is copied to a temporary file.
        with seekable(self.stream) as stream:
            try:
                file = pyarrow.parquet.ParquetFile(stream)
                for batch in file.iter_batches(batch_size=_ROWS):
                    yield pa.Table.from_batches([batch])
            except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
                raise DataError(
                    f"{self.name}: not a readable Parquet file ({error}); expected a complete one. Get the file again"
                ) from error


@contextmanager
def seekable(stream: io.BufferedReader) -> Iterator[BinaryIO]:
    """The stream itself, left open, if it can seek; else a copy in a temporary file."""
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
    """The parts of a stream, which may be compressed and may be a tar or a zip archive.

    Args:
        stream: The bytes.
        name: The name of the stream in reports.
        stem: Records without an id are named after it, unless the stream is an archive.
        position: Returns how many bytes of the source's file have been read.
        packed: Returns how many packed bytes have been read, for the limit of unpacked data.
        also: Members of a tar archive that are read whatever their names.

    Returns:
        A generator of parts, whose return value lists the names that were not read. It raises NoCorpus if an archive
        has nothing to read. It raises DataError, also while a part is read.
    """
    plain = decompress(stream, name, packed)
    head = plain.peek(_TAR_BLOCK)[:_TAR_BLOCK]
    if is_tar(head):
        return (yield from _tar_parts(plain, name=name, position=position, packed=packed, also=also))
    if head.startswith((ZIP, EMPTY_ZIP)):
        with seekable(plain) as file, open_zip(file, name) as archive:
            members, others = zip_members(archive, name)
            for member in members:
                yield zip_part(archive, member, name=f"{name}!{printable(member.filename)}", position=position)
        return others
    yield Part(name=name, stem=stem, stream=plain, position=position)
    return []


class NoCorpus(DataError):
    """An archive in which no file is named like a corpus. `names` are its files."""

    def __init__(self, archive: str, names: list[str]) -> None:
        found = ", ".join(map(printable, names[:5])) or "nothing"
        expected = file_names.expected_endings()
        super().__init__(f"{archive}: the archive holds {found}; expected {expected}. Unpack it and name the files")
        self.names = names


def is_tar(head: bytes) -> bool:
    """Whether a block begins a tar archive: its checksum is right, or it is the end of an empty archive."""
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return len(head) == _TAR_BLOCK and not any(head)
    return True


class _Header(tarfile.TarInfo):
    """A header that raises an error if it is broken or missing, which `tarfile` takes for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) == _TAR_BLOCK and not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises what `tarfile` takes for the end, which it is
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} instead of a member or the end mark of the archive") from error


def _tar_parts(
    stream: io.BufferedReader, *, name: str, position: Position, packed: Position, also: Container[str]
) -> Generator[Part, None, list[str]]:
    """The corpora of a tar archive in one pass, in its order; DailyDialog's texts are corpora too.

    Returns the names that were not read.
    """
    others: list[str] = []
    no_files: list[str] = []
    read = 0
    try:
        archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header)  # noqa: SIM115  # there is nothing to close
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # kept only for links, which are not followed; clearing saves memory
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
                raise DataError(
                    f"{place}: found a sparse file; expected a plain one. Unpack the archive and name its files"
                )
            read += 1
            plain = decompress(io.BufferedReader(CheckedStream(content.read, place)), place, packed)
            yield Part(name=place, stem=stem_of(member.name), stream=plain, position=position)
        _expect_zeros(archive, name)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise read_error(name, error) from error
    if not read:
        raise NoCorpus(name, others)
    return [*map(printable, file_names.skipped_files(others, [])), *no_files]


def _expect_zeros(archive: tarfile.TarFile, name: str) -> None:
    """Read on after the end of a tar archive, up to the checksum of a compressed stream. Raises DataError for data."""
    assert archive.fileobj is not None
    while rest := archive.fileobj.read(1 << 16):
        if any(rest):
            raise DataError(
                f"{name}: found data after the end mark of the archive; expected nothing there. Split concatenated "
                "archives into one file each"
            )


def open_zip(file: BinaryIO, name: str) -> zipfile.ZipFile:
    """Open a zip archive; `name` is its name in errors. Raises DataError if it is none."""
    # For a damaged directory, zipfile raises its own error, ValueError or OSError (a seek before the start) or
    # NotImplementedError (an unknown version).
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise DataError(
            f"{name}: not a readable zip archive ({error}); expected a complete one. Get the file again"
        ) from error


def zip_members(archive: zipfile.ZipFile, name: str) -> tuple[list[zipfile.ZipInfo], list[str]]:
    """The members to read and the names of the others. Raises DataError for none, encrypted ones and zip bombs."""
    # `is_dir` looks at the last character of the name, so a member without a name counts as a file.
    entries = [entry for entry in archive.infolist() if not (entry.filename and entry.is_dir())]
    names = [entry.filename for entry in entries]
    picked = set(file_names.select_files(names))
    members = [entry for entry in entries if entry.filename in picked]
    if not members:
        raise NoCorpus(name, names)
    for entry in members:
        if entry.flag_bits & 1:
            found = f"{name}!{printable(entry.filename)}"
            raise DataError(f"{found}: found an encrypted member; expected one without a password. Unpack the archive")
    # Members may share packed bytes, so compare their total size with the size of the file.
    assert archive.fp is not None
    refuse_bomb(name, sum(entry.file_size for entry in members), archive.fp.seek(0, io.SEEK_END))
    return members, list(map(printable, file_names.skipped_files(names, sorted(picked))))


def zip_part(archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, name: str, position: Position | None = None) -> Part:
    """One member of a zip archive, which may be a compressed file. Raises DataError, also while it is read."""
    # zipfile raises RuntimeError for passwords, NotImplementedError for rare methods, ValueError for wrong offsets.
    try:
        content = archive.open(member)
    except (*_BROKEN, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{name}: cannot be unpacked ({error}); expected a readable member. Unpack the archive and name its files"
        ) from error
    checked = CheckedStream(content.read, name, lambda: member.compress_size, content.close)
    plain = decompress(io.BufferedReader(checked), name, lambda: member.compress_size)

    def estimate() -> int:
        return member.header_offset + member.compress_size * checked.count // max(member.file_size, 1)

    return Part(name=name, stem=stem_of(member.filename), stream=plain, position=position or estimate)
