"""The sources of a call, and the splits that they name: kept apart, merged, or only some of them read.

A source argument may name a split: `data/:train`, `owner/talks:test`, `splits.json:dev`. Names inside archives and keys
of JSON files are known only when they are read; `parts.py` looks at them.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ismdata.convert.sources.arguments import (
    STANDARD_INPUT,
    expand,
    from_hub,
    in_memory,
    is_hub_name,
    no_such_split,
    with_unique_stems,
)
from ismdata.convert.sources.file_names import printable
from ismdata.convert.sources.source_types import AnySource, ConvertedSource, FileSource, StreamSource
from ismdata.convert.sources.splits import TRAIN, in_order, is_held_out, is_named, splits_of_files
from ismdata.errors import UsageError

if TYPE_CHECKING:
    from ismdata.convert.position import SourceReport

#: Values of `--splits` beside names of splits.
KEEP, MERGE = "keep", "merge"
#: Files that a note names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class FoundSources:
    """The sources of a call.

    Attributes:
        sources: The sources that are read, in order, each with its split if its name means one.
        left_out: The splits of sources that are not read.
        notes: What the user should know about the splits, one sentence each.
    """

    sources: tuple[AnySource, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def turns(self) -> list[tuple[int, AnySource]]:
        """The sources in the order in which repeats are dropped, each with its number: splits for measuring first.

        So a conversation in a split for measuring and in another one stays in the first. A file that names no split is
        read in two turns, because splits may be found in it; a stream can be read only once.
        """
        early: list[tuple[int, AnySource]] = []
        late: list[tuple[int, AnySource]] = []
        for number, source in enumerate(self.sources):
            if source.split is None and isinstance(source, FileSource):
                early.append((number, replace(source, held_out=True, skipped=())))
                late.append((number, replace(source, held_out=False)))
            else:
                (early if source.split is not None and is_held_out(source.split) else late).append((number, source))
        return [*early, *late]

    def check_named(self, reports: Sequence[SourceReport]) -> None:
        """Raise DataError unless each split that the user named was found.

        Args:
            reports: What was read from each source.
        """
        found = dict.fromkeys(
            [*self.left_out, *(name for report in reports for name in (*report.splits, *report.left_out))]
        )
        named = [name for name in found if name]
        rest = {TRAIN} if named and "" in found else set()
        for source in self.sources:
            for name in source.only or ():
                if not any(is_named(split, [name]) for split in {*named, *rest}):
                    raise no_such_split(source.name, [name], named)


@dataclass(frozen=True, kw_only=True)
class _Argument:
    """One argument: its name without the split, the split that it names, and its sources."""

    name: str
    sources: list[AnySource]
    only: tuple[str, ...] | None = None

    def place(self, source: AnySource, *, several: bool) -> list[str]:
        """The folders and the name of a source below the argument; with its own name if there are several arguments."""
        root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(self.name).parts))
        if several or not root.is_dir():
            root = root.parent
        prefix = printable(str(root))
        inside = source.name[len(prefix) :] if prefix != "." and source.name.startswith(prefix) else source.name
        return [part for part in PurePosixPath(inside.replace("!", "/")).parts if part != "/"]


def chosen_splits(splits: str) -> tuple[str, ...] | None:
    """The names in a value of `--splits`, None for `keep` and `merge`. Raises UsageError for an empty name."""
    if splits in (KEEP, MERGE):
        return None
    names = tuple(name.strip() for name in splits.split(","))
    if not all(names):
        raise UsageError(f"--splits {splits!r}: expected keep, merge, or names of splits such as train,test")
    return names


def find_sources(arguments: Sequence[Any], *, splits: str = KEEP, shares: str | None = None) -> FoundSources:
    """Resolve the source arguments of a call.

    Args:
        arguments: Files, folders, globs, hub names or "-", each perhaps with `:SPLIT`; datasets in memory.
        splits: What `--splits` says: keep, merge, or the names of splits to read.
        shares: The shares of `--split`, None if it is not given.

    Returns:
        The sources.

    Raises:
        DataError: If an argument names nothing, or a split that it does not have.
        UsageError: If `--split` would mix splits that the sources have.
    """
    given = [_expand(argument, number) for number, argument in enumerate(arguments, 1)]
    doubtful = _name_splits(given)
    wanted = chosen_splits(splits)
    notes: list[str] = []
    if shares is not None and splits != MERGE:
        notes += _forget_drawn(given)
    kept = [source for argument in given for source in _chosen(argument, wanted)]
    if not kept:
        found = [source.split for argument in given for source in argument.sources]
        raise no_such_split(", ".join(argument.name for argument in given), wanted or (), found)
    if shares is not None and splits != MERGE:
        check_unmixed([(source.split or TRAIN, source.name) for source in kept], shares)
    left = [source for argument in given for source in argument.sources if not _is_chosen(source, argument, wanted)]
    if left:
        notes.append(f"left out {_listed(left)}")
        kept[0] = replace(kept[0], skipped=(*kept[0].skipped, *(name for source in left for name in source.skipped)))
    if splits != MERGE and len({source.split or TRAIN for source in kept} | {split for _, split in doubtful}) > 1:
        notes += [
            f"{name}: the name may mean the split {split}, and was not taken for it. If it does, give the file "
            f"the name {split} with its ending"
            for name, split in doubtful[:_NAMED]
        ]
    _check_distinct(kept)
    left_out = tuple(source.split for source in left if source.split is not None)
    return FoundSources(sources=tuple(with_unique_stems(kept)), left_out=left_out, notes=tuple(notes))


def _check_distinct(sources: Sequence[AnySource]) -> None:
    """Raise UsageError if a file is named twice: its records would be read twice."""
    seen: set[tuple[str, str]] = set()
    for source in sources:
        if isinstance(source, FileSource):
            key = (os.path.realpath(source.path), source.member.filename if source.member else "")
        else:
            key = (source.name, "")
        if key in seen:
            raise UsageError(f"{source.name}: named twice; expected each source once. Name it once")
        seen.add(key)


def _expand(argument: Any, number: int) -> _Argument:
    """The sources of an argument. Raises DataError or UsageError."""
    if not isinstance(argument, str | os.PathLike):
        return _Argument(name=f"dataset{number}", sources=in_memory(argument, number))
    name = os.fspath(argument)
    head, colon, split = name.rpartition(":")
    if colon and not Path(name).exists() and not glob.glob(name):  # noqa: PTH207  # the pattern may be absolute
        owner, _, place = name.partition(":")
        if is_hub_name(owner):
            return _Argument(name=owner, sources=from_hub(owner, place))
        if head == STANDARD_INPUT or (head and (Path(head).exists() or glob.has_magic(head))):
            if not split:
                raise UsageError(f"{name}: names no split after the colon; expected one, such as {head}:{TRAIN}")
            return _Argument(name=head, only=(split,), sources=expand(head))
    return _Argument(name=name, sources=expand(name))


def _name_splits(given: Sequence[_Argument]) -> list[tuple[str, str]]:
    """Set the splits that names of files and folders mean; the names that may mean one, each with the split."""
    unnamed = [
        (argument, at)
        for argument in given
        for at, source in enumerate(argument.sources)
        if source.split is None and not isinstance(source, StreamSource)
    ]
    places = [argument.place(argument.sources[at], several=len(given) > 1) for argument, at in unnamed]
    found = splits_of_files(places)
    for (argument, at), split in zip(unnamed, found.splits, strict=True):
        argument.sources[at] = replace(argument.sources[at], split=split)
    return [(unnamed[at][0].sources[unnamed[at][1]].name, split) for at, split in found.doubtful]


def _is_chosen(source: AnySource, argument: _Argument, wanted: Sequence[str] | None) -> bool:
    """Whether a source is read, or has parts that may be."""
    return source.split is None or all(is_named(source.split, names) for names in (argument.only, wanted) if names)


def _chosen(argument: _Argument, wanted: Sequence[str] | None) -> list[AnySource]:
    """The sources of an argument that are read, with the splits of each that are. Raises DataError."""
    chosen = [source for source in argument.sources if _is_chosen(source, argument, wanted)]
    if argument.only is not None and not chosen:
        raise no_such_split(argument.name, argument.only, [source.split for source in argument.sources])
    only = argument.only if argument.only is not None else tuple(wanted) if wanted is not None else None
    return [replace(source, only=only) for source in chosen]


def _forget_drawn(given: Sequence[_Argument]) -> list[str]:
    """Let `--split` draw anew what an earlier `--split` drew; a note if it does."""
    names = set()
    for argument in given:
        for at, source in enumerate(argument.sources):
            if isinstance(source, ConvertedSource) and source.drawn and source.split is not None:
                names.add(source.split)
                argument.sources[at] = replace(source, split=None)
    return [f"{' and '.join(sorted(names))} were drawn by --split, and are split anew"] if len(names) > 1 else []


def check_unmixed(found: Iterable[tuple[str, str]], shares: str) -> None:
    """Raise UsageError if there are several splits: (split, source) each; `--split` would mix them."""
    names: dict[str, str] = {}
    for split, source in found:
        names.setdefault(split, source)
    if len(names) > 1:
        first, *_ = ordered = in_order(names, str)
        listed = ", ".join(f"{split} ({names[split]})" for split in ordered)
        raise UsageError(
            f"--split {shares}: the sources have the splits {listed}, which it would mix; expected one split. Read one "
            f"with --splits {first}, or pass --splits merge to split all of them anew"
        )


def _listed(sources: Sequence[AnySource]) -> str:
    """Sources by their splits, in words."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for source in sources:
        names[source.split or ""].append(source.name)
    return ", ".join(f"{split} ({shortened(sources)})" for split, sources in names.items())


def shortened(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the others.

    >>> shortened(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
