"""SOURCE arguments to things that can be read: files, archives, folders, globs, standard input, datasets, hub names."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import stat
import sys
import zipfile
from collections import defaultdict
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from ismdata.convert.sources.archives import (
    EMPTY_ZIP,
    ZIP,
    NoCorpus,
    Part,
    Watched,
    opened_zip,
    parts_of,
    unreadable,
    zip_members,
    zip_part,
)
from ismdata.convert.sources.file_names import (
    chosen,
    expected,
    is_archive,
    is_corpus,
    is_dialogues,
    passed_over,
    printable,
    stem_of,
)
from ismdata.errors import DataError

STANDARD_INPUT = "-"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*$")
#: Endings that no name on the hub has.
_FILE_ENDING = re.compile(r"(?i)\.(txt|gz|zst|bz2|xz|zip|tar|tgz|jsonl?|ndjson|parquet|csv|tsv|ya?ml)$")
#: How long the hub has for an answer.
_HUB_SECONDS = 10
_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """A file, or one member of a zip archive. `name` is what reports call it, `path` the file that is read and hashed.

    `passed_over` names the files that were not read beside it in its folder or zip archive; the first source of these
    has it. `found` says that it was not named but found in a folder: an archive without a corpus or a file of no known
    format is then passed over, not refused.
    `told_apart_as` is what records without an id are named after where another source's file has the same name.
    """

    name: str
    path: Path
    told_apart_as: str | None = None
    member: zipfile.ZipInfo | None = None
    archive: zipfile.ZipFile | None = field(default=None, repr=False, compare=False)
    found: bool = False
    passed_over: tuple[str, ...] = field(default=(), compare=False)

    #: Whether it can be read only once; `bytes` and `sha256()` are then known only after that.
    once = False

    @property
    def place(self) -> PurePosixPath:
        """Where it is: a path, which goes on inside an archive."""
        return PurePosixPath(self.name.replace("!", "/"))

    @property
    def bytes(self) -> int:
        return self._stat().st_size

    def sha256(self) -> str:
        """Of the file; of a member's archive. Raises DataError."""
        found = self._stat()
        return _sha256(self.path, self.name, found.st_size, found.st_mtime_ns)

    def identity(self) -> dict[str, Any]:
        """What tells, without reading, whether it is still the same. Raises DataError."""
        found = self._stat()
        return {"name": self.name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}

    def parts(self) -> Generator[Part, None, list[str]]:
        """What it holds, one after the other: itself, or the members of a tar archive.

        Returns the names of what it holds that was not read. Raises DataError.
        """
        try:
            return (yield from self._parts(()))
        except NoCorpus as error:
            # Texts are read where nothing else is there, which shows only at a tar archive's end.
            texts = chosen(error.names)
            if texts:
                return (yield from self._parts(texts))
            if self.found:
                return [self.name]
            raise

    def _parts(self, also: Container[str]) -> Generator[Part, None, list[str]]:
        if self.member is not None and self.archive is not None:
            member, size = zip_part(self.archive, self.member, name=self.name), self.member.compress_size
            return (
                yield from parts_of(
                    member.stream,
                    name=self.name,
                    stem=self.told_apart_as or member.stem,
                    position=member.position,
                    packed=lambda: size,
                    also=also,
                )
            )
        with _opened(self.name, self.path) as file:
            stem = self.told_apart_as or stem_of(self.path.name)
            position = file.tell
            return (yield from parts_of(file, name=self.name, stem=stem, position=position, packed=position, also=also))

    def _stat(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise unreadable(self.name, error) from error


def _opened(name: str, path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(name, error) from error


@lru_cache(maxsize=64)
def _sha256(path: Path, name: str, size: int, mtime_ns: int) -> str:
    """Read once for all members of an archive: size and time stand for the content."""
    digest = hashlib.sha256()
    with _opened(name, path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """Standard input or a named pipe: read once, from the first byte to the last."""

    name: str
    stem: str
    stream: BinaryIO = field(repr=False)
    passed_over: tuple[str, ...] = field(default=(), compare=False)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False, compare=False)
    _count: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)
    _ended: list[bool] = field(default_factory=list, repr=False, compare=False)

    once = True

    @property
    def bytes(self) -> int:
        """How much has been read so far."""
        return self._count[0]

    def sha256(self) -> str:
        """Of all bytes. Raises RuntimeError before its parts have been read to their end."""
        if not self._ended:
            raise RuntimeError(f"{self.name}: sha256() comes after parts()")
        return str(self._digest.hexdigest())

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": None, "mtime_ns": None}

    def parts(self) -> Generator[Part, None, list[str]]:
        """As `FileSource.parts`, once. Raises DataError."""

        def reached() -> int:
            return self.bytes

        watched = Watched(self._read, self.name)
        stream: io.BufferedReader = io.BufferedReader(watched)
        passed_over = yield from parts_of(stream, name=self.name, stem=self.stem, position=reached, packed=reached)
        while watched.read(1 << 20):  # what the parts did not need is part of the hash
            pass
        self._ended.append(True)
        return passed_over

    def _read(self, size: int) -> Any:
        chunk = self.stream.read(size)
        self._digest.update(chunk)
        self._count[0] += len(chunk)
        return chunk


@dataclass(frozen=True, kw_only=True)
class SavedDataset:
    """One split of a saved or downloaded `datasets` dataset. `path` is its folder, None for one from the hub."""

    name: str
    stem: str
    path: Path | None
    dataset: Any
    passed_over: tuple[str, ...] = field(default=(), compare=False)

    once = False

    @property
    def bytes(self) -> int:
        return int(self.dataset.data.nbytes)

    def sha256(self) -> str | None:
        """Of the names and hashes of the folder's data files; None for a dataset from the hub."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        for source in self._files():
            digest.update(source.path.name.encode() + source.sha256().encode())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What tells, without reading, whether it is still the same. Raises DataError."""
        return {"name": self.name, "files": [source.identity() for source in self._files()]}

    def _files(self) -> list[FileSource]:
        found = [] if self.path is None else sorted(self.path.rglob("*.arrow"))
        return [FileSource(name=printable(str(path)), path=path) for path in found]

    def tables(self) -> Iterator[pa.Table]:
        yield from self.dataset.with_format("arrow").iter(batch_size=_ROWS)


Source = FileSource | StreamSource


def expand(argument: str) -> list[Source | SavedDataset]:
    """What one SOURCE argument stands for. Raises DataError when it is nothing that can be read."""
    if argument == STANDARD_INPUT:
        return [StreamSource(name="<stdin>", stem="stdin", stream=sys.stdin.buffer)]
    path = Path(argument)
    kind = _kind(argument, path)
    if kind is not None:
        return _named(argument, path, kind)
    if glob.has_magic(argument):
        return _globbed(argument)
    # The hub is asked only for what cannot be meant as a path: it takes its time where there is no network.
    if _HUB_NAME.match(argument) and not _FILE_ENDING.search(argument) and not path.parent.is_dir():
        return _from_hub(argument)
    raise DataError(f"{printable(argument)}: no such file or folder; expected a corpus. See whether the name is right")


def told_apart(sources: Sequence[Source | SavedDataset]) -> list[Source | SavedDataset]:
    """The same sources; where files in several folders have one name, their records are named after folders too.

    >>> film, music = (FileSource(name=name, path=Path(name)) for name in ("kd/film/dev.json", "kd/music/dev.json"))
    >>> [source.told_apart_as for source in told_apart([film, music])]
    ['film/dev', 'music/dev']
    """
    told: list[Source | SavedDataset] = [*sources]
    alike: defaultdict[str, list[tuple[int, FileSource]]] = defaultdict(list)
    for number, source in enumerate(sources):
        if isinstance(source, FileSource):
            alike[stem_of(source.place.name)].append((number, source))
    for stem, files in alike.items():
        paths = [(*source.place.parts[:-1], stem) for _, source in files]
        whole = [source.place.parts for _, source in files]
        if len({*paths}) < len({*whole}):  # names that differ in their endings alone
            paths = whole
        if len({*paths}) > 1:
            depth = next(depth for depth in count(1) if len({path[-depth:] for path in paths}) == len({*paths}))
            for (number, source), path in zip(files, paths, strict=True):
                told[number] = replace(source, told_apart_as="/".join(path[-depth:]))
    return told


def _kind(name: str, path: Path) -> int | None:
    """The file type bits of what a path leads to, None where there is nothing. Raises DataError."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(printable(name), error) from error


def _named(name: str, path: Path, kind: int) -> list[Source | SavedDataset]:
    if kind == stat.S_IFDIR:
        return _saved(name, path) or _folder(name, path)
    if kind != stat.S_IFREG:
        return [StreamSource(name=printable(name), stem=stem_of(path.name), stream=_opened(printable(name), path))]
    return _file(printable(name), path).sources()


class _Found(NamedTuple):
    """The files that are read of a folder, an archive or a pattern's matches, and the names of the others."""

    files: list[FileSource]
    passed_over: list[str]

    def sources(self) -> list[Source | SavedDataset]:
        """The files; the first one has the names of those that are not read."""
        first, *rest = self.files
        return [replace(first, passed_over=tuple(self.passed_over)), *rest]


def _globbed(pattern: str) -> list[Source | SavedDataset]:
    """The files that a pattern names, each once, and the folders among the matches that no other match lies in."""
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # the pattern may be absolute
    inside = {str(parent) for match in matches for parent in Path(match).parents}
    folders = [match for match in matches if Path(match).is_dir() and str(Path(match)) not in inside]
    files: dict[str, str] = {}  # links may lead to a file twice
    for match in matches:
        if not Path(match).is_dir():
            files.setdefault(os.path.realpath(match), match)
    if not folders and not files:
        raise DataError(f"{printable(pattern)}: no file or folder of such a name; expected corpora. See the pattern")
    found = _Found([], [])
    if pattern.endswith("*"):  # takes what a folder would give; `*.txt` names its files itself
        root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
        found = _gathered(root, {os.path.relpath(match, root): Path(match) for match in files.values()}, [])
    if not found.files and not folders:
        return [source for match in files.values() for source in expand(match)]
    inner = [source for match in folders for source in expand(match)]
    if found.files:
        return [*found.sources(), *inner]
    first, *rest = inner
    return [replace(first, passed_over=(*first.passed_over, *map(printable, files.values()))), *rest]


def _file(name: str, path: Path) -> _Found:
    """A file as it is, or the members of the zip archive that it is."""
    with _opened(name, path) as file:
        try:
            magic = file.read(4)
        except OSError as error:
            raise unreadable(name, error) from error
    if magic not in (ZIP, EMPTY_ZIP):
        return _Found([FileSource(name=name, path=path)], [])
    with ExitStack() as opened:
        archive = opened_zip(opened.enter_context(_opened(name, path)), name)
        members, left = zip_members(archive, name)
        opened.pop_all()  # the members are read through it, as long as there are any
    sources = [
        FileSource(name=f"{name}!{printable(member.filename)}", path=path, member=member, archive=archive)
        for member in members
    ]
    return _Found(sources, [f"{name}!{other}" for other in left])


def _folder(name: str, path: Path) -> list[Source | SavedDataset]:
    files, left = _walked(Path(name), path)
    found = _gathered(Path(name), files, left)
    if not found.files:
        held = ", ".join(map(printable, sorted(files)[:5])) or "nothing"
        raise DataError(
            f"{printable(name)}: the folder holds {held}; expected {expected()}, or a saved dataset. Name a file"
        )
    return found.sources()


def _gathered(root: Path, files: dict[str, Path], others: Sequence[str]) -> _Found:
    """What is read of `files`, whose names are relative to `root`; of the rest the names, after `others`."""
    left = [*others]
    found: dict[str, FileSource] = {}
    tars: set[str] = set()
    for file, path in sorted(files.items()):
        shown = printable(str(root / file))
        try:
            members, beside = _file(shown, path) if is_corpus(file) or is_archive(file) else _Found([], [])
        except NoCorpus:
            members, beside = [], []
        left += beside
        if is_archive(file) and members and members[0].member is None:
            tars.add(file)
        for source in members or [FileSource(name=shown, path=path)]:
            key = file if source.member is None else f"{file}!{source.member.filename}"
            found[key] = replace(source, found=True)
    # DailyDialog comes with its splits as archives and as files: each is read once.
    plain = {PurePosixPath(file).name for file in files}
    again = {key for key in found if key not in files and is_dialogues(key) and PurePosixPath(key).name in plain}
    names = [key for key in found if key not in again and (is_dialogues(key) or not is_archive(key))]
    taken = [*chosen(names, texts=not tars, only=False), *tars]
    if not taken:
        return _Found([], left)
    left += [found[key].name for key in passed_over([*found], taken)]
    return _Found([found[key] for key in sorted(taken)], left)


def _walked(name: Path, path: Path) -> tuple[dict[str, Path], list[str]]:
    """The files below a folder by their relative names, and what is there but cannot be read. Raises DataError.

    Folders whose names begin with a dot are not entered, nor are links to folders.
    """
    files: dict[str, Path] = {}
    others: list[str] = []

    def refuse(error: OSError) -> None:
        raise unreadable(printable(str(error.filename)), error) from error

    for folder, inner, found in os.walk(path, onerror=refuse):
        links = [each for each in inner if (Path(folder) / each).is_symlink()]
        others += [
            f"{printable(str(name / Path(folder, each).relative_to(path)))} (a link to a folder)" for each in links
        ]
        inner[:] = [each for each in inner if not each.startswith(".") and each not in links]
        for each in found:
            file = Path(folder) / each
            if file.is_file():
                files[file.relative_to(path).as_posix()] = file
            else:
                others.append(f"{printable(str(name / file.relative_to(path)))} (no file)")
    return files, others


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
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # `load_dataset` takes half a minute to give up a hub that it cannot reach, and logs each try: ask once first.
        # Told to stay offline, it takes what was downloaded before.
        with suppress(OfflineModeIsEnabled):
            huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS)
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, permission, unknown name: each library below has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: no such file, and as the name of a hub dataset it gave: {reason}. See whether the name is right; "
            "without a network, HF_HUB_OFFLINE=1 reads what was downloaded before"
        ) from error
    return [
        SavedDataset(name=f"{name}!{split}", stem=f"{name.rsplit('/')[-1]}-{split}", path=None, dataset=dataset)
        for split, dataset in loaded.items()
    ]
