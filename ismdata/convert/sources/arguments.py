"""Resolves SOURCE arguments: files, archives, folders, globs, standard input, saved datasets, converted folders,
names on the hub. `find.py` adds what concerns splits.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ismdata.conversation import FORMAT
from ismdata.convert.sources.archives import EMPTY_ZIP, ZIP, NoCorpus, open_zip, read_error, zip_members
from ismdata.convert.sources.file_names import (
    expected_endings,
    has_file_ending,
    is_archive,
    is_corpus,
    is_dialogues,
    printable,
    select_files,
    skipped_files,
    stem_of,
)
from ismdata.convert.sources.foreign import refuse_url
from ismdata.convert.sources.source_types import (
    AnySource,
    ConvertedSource,
    FileSource,
    SavedDataset,
    StreamSource,
    open_file,
)
from ismdata.convert.sources.splits import declared_splits, is_named
from ismdata.data import FORMAT as PACKED_FORMAT
from ismdata.data import INDEX_NAME, SPLIT_FORMAT, ConvertedFolder, load_index, part_names
from ismdata.errors import DataError, UsageError

STANDARD_INPUT = "-"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*$")
#: Seconds to wait for an answer of the hub.
_HUB_SECONDS = 10


def expand(argument: str) -> list[AnySource]:
    """The sources that one SOURCE argument names. Raises DataError if there are none."""
    if argument == STANDARD_INPUT:
        return [StreamSource(name="<stdin>", stem="stdin", stream=sys.stdin.buffer)]
    path = Path(argument)
    kind = _file_type(argument, path)
    if kind is not None:
        return _existing(argument, path, kind)
    refuse_url(argument)
    if glob.has_magic(argument):
        return _matching(argument)
    # Without a network the hub takes seconds to fail, so it is tried only for names that cannot be paths.
    if is_hub_name(argument):
        return from_hub(argument)
    raise DataError(f"{printable(argument)}: no such file or folder; expected a corpus. Check the name")


def is_hub_name(argument: str) -> bool:
    """Whether an argument can be a name on the hub and no path."""
    return bool(_HUB_NAME.match(argument)) and not has_file_ending(argument) and not Path(argument).parent.is_dir()


def with_unique_stems(sources: Sequence[AnySource]) -> list[AnySource]:
    """The same sources; if files in several folders have one name, their records are named after the folders too.

    >>> film, music = (FileSource(name=name, path=Path(name)) for name in ("kd/film/dev.json", "kd/music/dev.json"))
    >>> [source.unique_stem for source in with_unique_stems([film, music])]
    ['film/dev', 'music/dev']
    """
    renamed: list[AnySource] = [*sources]
    by_stem: defaultdict[str, list[tuple[int, FileSource]]] = defaultdict(list)
    for number, source in enumerate(sources):
        if isinstance(source, FileSource):
            by_stem[stem_of(source.place.name)].append((number, source))
    for stem, files in by_stem.items():
        paths = [(*source.place.parts[:-1], stem) for _, source in files]
        whole = [source.place.parts for _, source in files]
        if len({*paths}) < len({*whole}):  # names that differ only in their endings
            paths = whole
        if len({*paths}) > 1:
            depth = next(depth for depth in count(1) if len({path[-depth:] for path in paths}) == len({*paths}))
            for (number, source), path in zip(files, paths, strict=True):
                renamed[number] = replace(source, unique_stem="/".join(path[-depth:]))
    return renamed


def _file_type(name: str, path: Path) -> int | None:
    """The file type bits at a path, None if there is nothing. Raises DataError."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise read_error(printable(name), error) from error


def _existing(name: str, path: Path, kind: int) -> list[AnySource]:
    """The sources at an existing path; `kind` holds its file type bits."""
    if kind == stat.S_IFDIR:
        return _saved(name, path) or _converted(name, path) or _folder(name, path)
    if kind != stat.S_IFREG:
        return [StreamSource(name=printable(name), stem=stem_of(path.name), stream=open_file(printable(name), path))]
    return _file(printable(name), path).sources()


class _Selection(NamedTuple):
    """The files of a folder, an archive or a pattern that are read, and the names of the others."""

    files: list[FileSource]
    skipped: list[str]

    def sources(self) -> list[AnySource]:
        """The files; the first one has the names of those that are not read."""
        first, *rest = self.files
        return [replace(first, skipped=tuple(self.skipped)), *rest]


def _matching(pattern: str) -> list[AnySource]:
    """The files that match a pattern, each once, and the matching folders that contain no other match."""
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # the pattern may be absolute
    inside = {str(parent) for match in matches for parent in Path(match).parents}
    folders = [match for match in matches if Path(match).is_dir() and str(Path(match)) not in inside]
    files: dict[str, str] = {}  # by real path: links may lead to a file twice
    for match in matches:
        if not Path(match).is_dir():
            files.setdefault(os.path.realpath(match), match)
    if not folders and not files:
        raise DataError(f"{printable(pattern)}: no file or folder matches; expected corpora. Check the pattern")
    selection = _Selection([], [])
    if pattern.endswith("*"):  # selects as in a folder; `*.txt` names its files itself
        root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
        selection = _select(root, {os.path.relpath(match, root): Path(match) for match in files.values()}, [])
    if not selection.files and not folders:
        return [source for match in files.values() for source in expand(match)]
    inner = [source for match in folders for source in expand(match)]
    if selection.files:
        return [*selection.sources(), *inner]
    first, *rest = inner
    return [replace(first, skipped=(*first.skipped, *map(printable, files.values()))), *rest]


def _file(name: str, path: Path) -> _Selection:
    """A file, or the members of a zip archive."""
    with open_file(name, path) as file:
        try:
            magic = file.read(4)
        except OSError as error:
            raise read_error(name, error) from error
    if magic not in (ZIP, EMPTY_ZIP):
        return _Selection([FileSource(name=name, path=path)], [])
    with ExitStack() as stack:
        archive = open_zip(stack.enter_context(open_file(name, path)), name)
        members, others = zip_members(archive, name)
        stack.pop_all()  # the file stays open as long as its members exist: they are read through it
    sources = [
        FileSource(
            name=f"{name}!{printable(member.filename)}",
            path=path,
            member=member,
            archive=archive,
            siblings=len(members) > 1,
        )
        for member in members
    ]
    return _Selection(sources, [f"{name}!{other}" for other in others])


def _folder(name: str, path: Path) -> list[AnySource]:
    files, others = _walk(Path(name), path)
    selection = _select(Path(name), files, others)
    if not selection.files:
        names = ", ".join(map(printable, sorted(files)[:5])) or "nothing"
        raise DataError(
            f"{printable(name)}: the folder holds {names}; expected {expected_endings()}, or a saved dataset. "
            "Name a file"
        )
    return selection.sources()


def _select(root: Path, files: dict[str, Path], others: Sequence[str]) -> _Selection:
    """Which of `files` are read; their names are relative to `root`. The names of the rest follow `others`."""
    skipped = [*others]
    found: dict[str, FileSource] = {}
    tars: set[str] = set()
    for file, path in sorted(files.items()):
        shown = printable(str(root / file))
        try:
            members, beside = _file(shown, path) if is_corpus(file) or is_archive(file) else _Selection([], [])
        except NoCorpus:
            members, beside = [], []
        skipped += beside
        if is_archive(file) and members and members[0].member is None:
            tars.add(file)
        for source in members or [FileSource(name=shown, path=path)]:
            key = file if source.member is None else f"{file}!{source.member.filename}"
            found[key] = replace(source, from_folder=True)
    # DailyDialog has its splits both in archives and as files: each is read once.
    plain = {PurePosixPath(file).name for file in files}
    repeated = {key for key in found if key not in files and is_dialogues(key) and PurePosixPath(key).name in plain}
    names = [key for key in found if key not in repeated and (is_dialogues(key) or not is_archive(key))]
    selected = [*select_files(names, texts=not tars, only=False), *tars]
    if not selected:
        return _Selection([], skipped)
    skipped += [found[key].name for key in skipped_files([*found], selected)]
    return _Selection([found[key] for key in sorted(selected)], skipped)


def _walk(name: Path, path: Path) -> tuple[dict[str, Path], list[str]]:
    """The files below a folder by their relative names, and the names of links and devices. Raises DataError.

    Hidden folders and links to folders are not entered.
    """
    files: dict[str, Path] = {}
    others: list[str] = []

    def refuse(error: OSError) -> None:
        raise read_error(printable(str(error.filename)), error) from error

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


def _saved(name: str, path: Path) -> list[AnySource]:
    """The splits in a folder that `datasets` saved; an empty list for other folders."""
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return []
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises errors of many kinds for a broken folder
        raise DataError(f"{name}: not a readable saved dataset ({error}). Save it again with `save_to_disk`") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return [SavedDataset(name=name, stem=path.name, path=path, dataset=loaded)]
    return _splits_of(loaded, name, path.name, path)


def _splits_of(loaded: Mapping[str, Any], name: str, stem: str, path: Path | None) -> list[AnySource]:
    """The splits of a `DatasetDict`."""
    splits = declared_splits(map(str, loaded))
    return [
        SavedDataset(
            name=f"{name}!{key}",
            stem=f"{stem}-{key}",
            path=None if path is None else path / key,
            dataset=dataset,
            split=splits[str(key)],
        )
        for key, dataset in loaded.items()
    ]


def in_memory(dataset: Any, number: int) -> list[AnySource]:
    """The sources of a `Dataset` or `DatasetDict`, the `number`-th argument counted from 1. Raises UsageError."""
    import datasets

    name = f"dataset{number}"
    if isinstance(dataset, datasets.DatasetDict):
        return _splits_of(dataset, name, name, None)
    if isinstance(dataset, datasets.Dataset):
        return [SavedDataset(name=name, stem=name, path=None, dataset=dataset)]
    raise UsageError(
        f"source {number} is {type(dataset).__name__}; expected a path, a name, a datasets.Dataset or a DatasetDict. "
        "Save a streamed dataset to files first"
    )


def _converted(name: str, path: Path) -> list[AnySource]:
    """A converted folder, or the parts of one with splits; an empty list for other folders. Raises DataError."""
    if not (path / INDEX_NAME).is_file():
        return []
    try:
        index = load_index(path)
    except DataError:
        return []  # another program's index
    if index.get("format") == FORMAT:
        options = index.get("options", {})
        drawn = options.get("split") is not None
        folder = ConvertedFolder(path)
        return [ConvertedSource(name=name, folder=folder, drawn=drawn, split=options.get("part"))]
    if index.get("format") == SPLIT_FORMAT:
        return [part for split in part_names(path) for part in _converted(f"{name}/{split}", path / split)]
    if index.get("format") == PACKED_FORMAT:
        raise DataError(f"{printable(name)}: found a packed folder; expected a corpus. Name what it was packed from")
    return []


def from_hub(name: str, place: str = "") -> list[AnySource]:
    """The splits of a dataset on the hub.

    Args:
        name: Its name.
        place: What follows the name after a colon: a configuration or a split, or `CONFIGURATION:SPLIT`.

    Returns:
        A source for each split, or for the one that `place` names.

    Raises:
        DataError: If there is no such dataset, configuration or split.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    config, _, split = place.rpartition(":")
    try:
        # `load_dataset` needs half a minute to give up on an unreachable hub and logs each try, so test the connection
        # first. In offline mode it reads what was downloaded before.
        with suppress(OfflineModeIsEnabled):
            huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS)
        configs = list(datasets.get_dataset_config_names(name)) if place else []
        if split in configs and not config and len(configs) > 1:
            config, split = split, ""
        loaded = datasets.load_dataset(name, config) if config else datasets.load_dataset(name)
    except Exception as error:  # network, permission, unknown name: each library has its own exceptions
        found = re.search(r"available configs: (\[[^\]]*\])", str(error))
        if found is not None:
            configs = re.findall(r"'([^']*)'", found.group(1))
            raise DataError(
                f"{name}: has the configurations {', '.join(configs)}; expected one of them. Name {name}:{configs[0]}"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: no such file, and it cannot be loaded as a hub dataset ({reason}); expected a corpus. Check the "
            "name. Without a network, set HF_HUB_OFFLINE=1 to read what was downloaded before"
        ) from error
    sources = _splits_of(loaded, f"{name}:{config}" if config else name, name.rsplit("/")[-1], None)
    chosen = [source for source in sources if not split or is_named(source.split or "", [split])]
    if not chosen:
        raise no_such_split(name, [split], [source.split for source in sources])
    return chosen


def no_such_split(name: str, wanted: Iterable[str], found: Iterable[str | None]) -> DataError:
    """The error for splits that a source does not have."""
    names = ", ".join(dict.fromkeys(filter(None, found)))
    has = f"has the splits {names}" if names else "names no splits"
    return DataError(f"{name}: {has}; expected {', '.join(wanted)}. Check the name of the split, or leave it out")
