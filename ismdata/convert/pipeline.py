"""`ismdata convert`: raw corpora of any known format in, one folder of canonical conversations out.

Sources are framed into blocks of complete records in order, the blocks are read side by side, and what comes of them is
cleaned and written in the order of the sources: neither rows nor bytes depend on the number of workers. A journal in
the unfinished folder says how far that is, so that the same command goes on after a crash.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ismdata import __version__
from ismdata.choices import Paths, Preference, Side
from ismdata.conversation import Quarantined
from ismdata.convert.canonical import Rules, role_table
from ismdata.convert.corpus_format import Choices
from ismdata.convert.digests import Digests, digests
from ismdata.convert.explain import Explanation, explain
from ismdata.convert.filters import against_digests
from ismdata.convert.formats.registry import FORMATS
from ismdata.convert.job import ConversionJob, Selection, SourceReport
from ismdata.convert.mapping_file import load_mapping
from ismdata.convert.parts import FormatChoice, open_parts
from ismdata.convert.read_block import read_block
from ismdata.convert.sampling import parse_split
from ismdata.convert.sources.arguments import expand, with_unique_stems
from ismdata.convert.sources.source_types import SavedDataset, Source
from ismdata.convert.worker_pool import WorkerPool
from ismdata.data import INDEX_NAME, Journal, describe_file, open_output
from ismdata.errors import UsageError
from ismdata.memory import kept_memory


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` did; `read` = `written` + the sum of `quarantined`. `first`: a refusal of each reason.

    `duplicates`: conversations that repeat an earlier one word for word, whether they were written or not. `parts`:
    conversations of each part of a split, by its folder.
    """

    output: Path
    read: int
    written: int
    quarantined: dict[str, int]
    duplicates: int
    parts: dict[str, int]
    first: dict[str, Quarantined]
    sources: tuple[SourceReport, ...]
    ignored_fields: dict[str, int]
    notes: tuple[str, ...]
    shards: int
    seconds: float


def convert(
    sources: Sequence[str],
    output: Path,
    *,
    format: str = "auto",
    mapping: Path | None = None,
    roles: Mapping[str, str] = MappingProxyType({}),
    assistant: Side | None = None,
    tree: Paths = "all",
    preference: Preference | None = None,
    join: bool = False,
    selection: Selection = Selection(),  # noqa: B008  # frozen
    workers: int = 0,
    processes: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Read `sources` and write the folder `output`, complete or not at all.

    `format` is "auto" or a key of FORMATS; `mapping` a TOML file that says how to read anything else. `roles` adds role
    names to the usual ones. `assistant`, `tree` and `preference` decide what the data leave open (`base.Choices`);
    `join` makes one message of several in a row of one side. `workers` blocks are read side by side, 0 means one a
    core: in threads and, with `processes`, in processes where reading turns out to be slow (`workers.WorkerPool`).
    `progress` is called with bytes done and bytes in all.

    Raises UsageError when an option cannot be or the output is in use, DataError when a source cannot be read, is
    broken, is of no known format, has changed since an interrupted run, or when no conversation at all comes of it.
    """
    started = time.perf_counter()
    _check_call(sources, format, mapping)
    _check_selection(selection, workers)
    wanted, rules = _format(format, mapping, roles, assistant, tree, preference, join)
    with (
        open_output(output, overwrite=overwrite, inputs=sources, resumable=True) as folder,
        WorkerPool(workers or os.cpu_count() or 1, processes=processes) as pool,
        kept_memory(),
    ):
        expanded = with_unique_stems([source for argument in sources for source in expand(argument)])
        others = [_other(argument) for argument in selection.against]
        options = {
            "format": format,
            "mapping": mapping.read_text(encoding="utf-8") if mapping else None,
            "role": dict(sorted(roles.items())),
            "assistant": assistant,
            "tree": tree,
            "preference": preference,
            "join": join,
            **asdict(selection.cleaning),
            "against": list(selection.against),
            "sample": selection.sample,
            "seed": selection.seed,
            "split": selection.split,
        }
        run = {
            "command": "convert",
            "version": __version__,
            "options": options,
            "sources": [source.identity() for source in expanded],
            "others": [other.identity() for other in others],
        }
        journal = Journal.open(folder, run, restart=overwrite)
        try:
            against = np.concatenate([other.digests(wanted, rules) for other in others]) if others else None
            job = ConversionJob(folder, selection, against, journal)
            job.read(expanded, wanted, rules, pool, progress or (lambda done, total: None))
            job.finish(options)
        finally:
            journal.close()
    return ConvertReport(
        output=output,
        read=job.read_count,
        written=job.written,
        quarantined=dict(sorted(job.quarantine.reasons.items())),
        duplicates=job.duplicates,
        parts={part.name: part.writer.rows for part in job.parts if part.name},
        first=job.quarantine.first,
        sources=tuple(job.mark.reports),
        ignored_fields=dict(sorted(job.mark.ignored.items())),
        notes=(
            *(f"skipped: {reason}" for reason in job.mark.unknown),
            *_notes(job.mark.reports, assistant, tree, preference),
        ),
        shards=sum(len(part.writer.shards) for part in job.parts),
        seconds=time.perf_counter() - started,
    )


def explained_sources(
    sources: Sequence[str],
    *,
    format: str = "auto",
    mapping: Path | None = None,
    roles: Mapping[str, str] = MappingProxyType({}),
    assistant: Side | None = None,
) -> Iterator[Explanation]:
    """What each source would be taken for and how its first record would be read; nothing is written.

    Raises as `convert` does.
    """
    _check_call(sources, format, mapping)
    wanted, _ = _format(format, mapping, roles, assistant, "all", None, False)
    for argument in sources:
        for source in expand(argument):
            yield explain(source, wanted)


def _check_call(sources: Sequence[str], format: str, mapping: Path | None) -> None:
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"--format {format}: no such format; expected auto, {', '.join(FORMATS)}")
    if format != "auto" and mapping is not None:
        raise UsageError(f"--format {format} and --mapping exclude each other; leave one out")
    if not sources:
        raise UsageError("no source given; expected files, folders or hub names to convert")


def _check_selection(selection: Selection, workers: int) -> None:
    if workers < 0:
        raise UsageError(f"--workers {workers}: expected 0 (one a core) or more")
    if selection.sample is not None and selection.sample < 1:
        raise UsageError(f"--sample {selection.sample}: expected 1 or more")
    if selection.split is not None:
        parse_split(selection.split)


def _format(
    name: str,
    mapping: Path | None,
    roles: Mapping[str, str],
    assistant: Side | None,
    tree: Paths,
    preference: Preference | None,
    join: bool,
) -> tuple[FormatChoice, Rules]:
    """How records are read: by a mapping, a named format or the one they look like."""
    mapped = load_mapping(mapping) if mapping else None
    table = role_table({**(mapped.roles if mapped else {}), **roles})
    side = assistant or (mapped.assistant if mapped else "second")
    choices = Choices(roles=table, assistant=side, tree=tree, preference=preference)
    rules = Rules(roles=table, join=join or (mapped is not None and mapped.join))
    return FormatChoice(name=str(mapping) if mapping else name, corpus_format=mapped, choices=choices), rules


def _notes(
    reports: Sequence[SourceReport], assistant: Side | None, tree: Paths, preference: Preference | None
) -> tuple[str, ...]:
    """What the user should hear that is no error: choices that concern no format that was read."""
    formats = {name for report in reports for name in report.format.split(", ")} & FORMATS.keys()
    asked = {"assistant": assistant is not None, "tree": tree != "all", "preference": preference is not None}
    return tuple(
        f"--{name} had no effect: {', '.join(sorted(formats))} leaves nothing open there"
        for name, given in asked.items()
        if given and formats and not any(FORMATS[one].depends_on(name) for one in formats)
    )


@dataclass(frozen=True, kw_only=True)
class _Other:
    """A corpus whose conversations are left out: a converted folder, or sources that are read for it."""

    name: str
    folder: Path | None
    sources: tuple[Source | SavedDataset, ...] = ()

    def identity(self) -> dict[str, Any]:
        if self.folder is not None:
            return {"name": self.name, "sha256": describe_file(self.folder / INDEX_NAME, 0).sha256}
        return {"name": self.name, "sources": [source.identity() for source in self.sources]}

    def digests(self, format: FormatChoice, rules: Rules) -> Digests:
        """uint64[N, 2], one a conversation."""
        if self.folder is not None:
            return against_digests(self.folder)
        found = [np.empty((0, 2), np.uint64)]
        for source in self.sources:
            for part in open_parts(source, format):
                found += [digests(read_block(block, rules).rows) for block in part.blocks]
        return np.concatenate(found)


def _other(argument: str) -> _Other:
    folder = Path(argument)
    if (folder / INDEX_NAME).is_file():
        return _Other(name=argument, folder=folder)
    return _Other(name=argument, folder=None, sources=tuple(expand(argument)))
