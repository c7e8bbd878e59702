"""SOURCE arguments to things that can be read: files, members of archives, Parquet, saved datasets, hub names."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa

from ismdata.errors import DataError

_GZIP, _ZIP, _PARQUET = b"\x1f\x8b", b"PK\x03\x04", b"PAR1"
_EMPTY_ZIP = b"PK\x05\x06"
#: What is read from a folder or an archive; a file that is named itself may be called anything.
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".json.gz", ".jsonl.gz", ".ndjson.gz")
#: DailyDialog's texts, and beside them its labels, which are no dialogues.
_DIALOGUES = re.compile(r"dialogues_(?!act|emotion|topic)\w+\.txt$")
_DIALOGUE_ARCHIVES = frozenset({"train.zip", "validation.zip", "test.zip"})
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*$")
_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Source:
    """One stream of records. `name` is what places in it are named after, `path` the file that is read and hashed."""

    name: str
    path: Path
    member: str | None = None

    @property
    def stem(self) -> str:
        """The name without folders and endings: what records without an id are named after."""
        name = Path(self.member or self.path.name).name
        return re.sub(r"(?i)(\.(jsonl?|ndjson|txt|parquet|gz|zip))+$", "", name) or name

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def is_parquet(self) -> bool:
        with self.open() as (stream, _):
            return stream.read(4) == _PARQUET

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
        """The unpacked bytes, and how far the file has been read. Raises DataError, while bytes are read too."""
        try:
            with self.path.open("rb") as file:
                if self.member is not None:
                    with (
                        zipfile.ZipFile(file) as archive,
                        archive.open(self.member) as stream,
                        _gunzipped(stream) as plain,
                    ):
                        yield plain, file.tell
                else:
                    with _gunzipped(file) as plain:
                        yield plain, file.tell
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.name}: the compressed data is broken or cut off ({error}). The download may be incomplete: "
                "get the file again"
            ) from error
        except (RuntimeError, NotImplementedError) as error:  # what zipfile raises for passwords and rare methods
            raise DataError(
                f"{self.name}: cannot be unpacked ({error}). Unpack the archive and name its files"
            ) from error

    def tables(self) -> Iterator[pa.Table]:
        """The rows of a Parquet file, some at a time. Raises DataError."""
        import pyarrow.parquet

        with self.open() as (stream, _):
            try:
                file = pyarrow.parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
                for batch in file.iter_batches(batch_size=_ROWS):
                    yield pa.Table.from_batches([batch])
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{self.name}: not a readable Parquet file ({error}). Get the file again") from error


@contextmanager
def _gunzipped(stream: IO[bytes]) -> Iterator[BinaryIO]:
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]  # files and zip members both read into buffers
    if buffered.peek(2)[:2] == _GZIP:
        with gzip.GzipFile(fileobj=buffered) as unpacked:
            yield unpacked  # type: ignore[misc]
    else:
        yield buffered


@dataclass(frozen=True, kw_only=True)
class SavedDataset:
    """One split of a saved or downloaded `datasets` dataset. `path` is its folder, None for one from the hub."""

    name: str
    stem: str
    path: Path | None
    dataset: Any

    @property
    def bytes(self) -> int:
        return int(self.dataset.data.nbytes)

    def sha256(self) -> str | None:
        """Of the names and hashes of the folder's data files; None for a dataset from the hub."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*.arrow")):
            digest.update(path.name.encode() + Source(name="", path=path).sha256().encode())
        return digest.hexdigest()

    def tables(self) -> Iterator[pa.Table]:
        yield from self.dataset.with_format("arrow").iter(batch_size=_ROWS)


def expand(argument: str) -> list[Source | SavedDataset]:
    """What one SOURCE argument stands for. Raises DataError when it is nothing that can be read."""
    path = Path(argument)
    if path.is_dir():
        return _saved(argument, path) or [*_folder(argument, path)]
    if path.exists():
        return list(_file(argument, path))
    # The hub is asked only for what cannot be meant as a path: it takes its time where there is no network.
    is_file_name = argument.endswith((*_SUFFIXES, ".txt", ".zip", ".gz")) or path.parent.is_dir()
    if _HUB_NAME.match(argument) and not is_file_name:
        return _from_hub(argument)
    raise DataError(f"{argument}: no such file or folder; expected a corpus. See whether the name is right")


def _file(name: str, path: Path) -> list[Source]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); expected a readable file") from error
    if magic not in (_ZIP, _EMPTY_ZIP):
        return [Source(name=name, path=path)]
    try:
        with zipfile.ZipFile(path) as archive:
            members = [entry for entry in archive.namelist() if not entry.endswith("/") and "__MACOSX" not in entry]
    except zipfile.BadZipFile as error:
        raise DataError(f"{name}: not a readable zip archive ({error}). Get the file again") from error
    chosen = [member for member in members if _DIALOGUES.search(member)]
    chosen = chosen or [member for member in members if member.lower().endswith(_SUFFIXES)]
    if not chosen and len(members) == 1:
        chosen = members
    if not chosen:
        held = ", ".join(members[:5]) or "nothing"
        raise DataError(f"{name}: the archive holds {held}; expected {_expected()}. Unpack it and name the files")
    return [Source(name=f"{name}!{member}", path=path, member=member) for member in chosen]


def _folder(name: str, path: Path) -> list[Source]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    dialogues = {file.name: file for file in files if _DIALOGUES.search(file.name)}
    archived = [
        source
        for file in files
        if file.name in _DIALOGUE_ARCHIVES
        for source in _file(str(Path(name) / file.relative_to(path)), file)
        if _DIALOGUES.search(str(source.member)) and Path(str(source.member)).name not in dialogues
    ]
    if len(dialogues) + len(archived) > 1:
        dialogues.pop("dialogues_text.txt", None)  # the splits together, once more
    if dialogues or archived:
        plain = [Source(name=str(Path(name) / file.relative_to(path)), path=file) for file in dialogues.values()]
        return sorted([*plain, *archived], key=lambda source: source.name)
    chosen = [file for file in files if file.name.lower().endswith(_SUFFIXES)]
    if not chosen:
        held = ", ".join(str(file.relative_to(path)) for file in files[:5]) or "nothing"
        raise DataError(f"{name}: the folder holds {held}; expected {_expected()}, or a saved dataset. Name a file")
    return [Source(name=str(Path(name) / file.relative_to(path)), path=file) for file in chosen]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _expected() -> str:
    return f"files ending in {', '.join(_SUFFIXES)}, or DailyDialog's dialogues_*.txt"


def _saved(name: str, path: Path) -> list[Source | SavedDataset]:
    """The splits of a folder that `datasets` saved; empty when it is not one."""
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return []
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes of it, in a library's many kinds
        raise DataError(f"{name}: not a readable saved dataset ({error}). Save it again with `save_to_disk`") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    return [
        SavedDataset(
            name=f"{name}!{split}" if split else name,
            stem=f"{path.name}-{split}" if split else path.name,
            path=path / split,
            dataset=dataset,
        )
        for split, dataset in splits.items()
    ]


def _from_hub(name: str) -> list[Source | SavedDataset]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, permission, unknown name: each library below has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: no such file, and as the name of a hub dataset it gave: {reason}. See whether the name is right"
        ) from error
    return [
        SavedDataset(name=f"{name}!{split}", stem=f"{name.rsplit('/')[-1]}-{split}", path=None, dataset=dataset)
        for split, dataset in loaded.items()
    ]
