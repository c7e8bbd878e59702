"""`ismdata convert`: raw corpora of any known format in, a folder of canonical conversations out.

The steps, each in a module of its own:

1. sources/arguments.py: SOURCE arguments to sources: files, archives, folders, datasets.
2. parts.py: a source to its parts, and each part to blocks of complete records.
3. read_block.py: a block to conversations, on the fast path (columnar.py) or the general one (canonical.py). Blocks are
   read in parallel; their results are taken in order.
4. job.py: conversations through the filters (filters.py) to the shards or the quarantine.

Neither rows nor bytes of the output depend on the number of workers. A journal in the unfinished folder records how far
the run is, so that the same command resumes after an interruption.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ismdata import __version__
from ismdata.concurrency import map_in_order
from ismdata.conversation import Quarantined
from ismdata.convert.against import OtherCorpus
from ismdata.convert.canonical import Rules, role_table
from ismdata.convert.corpus_format import Choices
from ismdata.convert.explain import Explanation, explain
from ismdata.convert.formats.registry import FORMATS
from ismdata.convert.job import ConversionJob
from ismdata.convert.mapping_file import load_mapping
from ismdata.convert.options import ConvertOptions
from ismdata.convert.parts import CONVERTED, UNKNOWN, FormatChoice, SourceBlocks, expected_format
from ismdata.convert.position import SourceReport, combine
from ismdata.convert.read_block import read_block
from ismdata.convert.sources.find import MERGE, find_sources, shortened
from ismdata.convert.sources.source_types import AnySource, FileSource
from ismdata.convert.sources.splits import TRAIN, in_order
from ismdata.convert.worker_pool import WorkerPool
from ismdata.data import Journal, JournaledLeftovers, open_output
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError
from ismdata.memory import kept_memory

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` did. All counts are of conversations.

    Attributes:
        output: The folder that was written.
        read: `written` + all of `quarantined`.
        written: Conversations in the shards.
        quarantined: Refused and dropped conversations, by reason.
        duplicates: Conversations that are the same as an earlier one, whether written or not.
        parts: Conversations in each split, by the name of its folder; empty if the output is one folder.
        first: The first refusal of each reason.
        sources: What was read from each source.
        ignored_fields: How many message fields were dropped, by name.
        notes: What the user should know and is no error, one sentence each.
        shards: Number of shards.
        seconds: Wall time.
        drawn: Whether `parts` were drawn by `--split`, rather than named by the sources.
        splits: The splits that the sources name, each with the names of these sources.
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
    drawn: bool = False
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)


def convert(
    sources: Sequence[str | os.PathLike[str] | Dataset | DatasetDict],
    output: Path,
    options: ConvertOptions | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter = LOGGED,
    **fields: Any,
) -> ConvertReport:
    """Convert raw corpora to one folder of conversations, or to a folder with one for each split that they have.

    The folder is written completely or not at all. If it is interrupted, the same call resumes.

    Args:
        sources: Files, archives, folders, globs, converted folders, hub names of datasets, or "-" for standard input;
            each may end in `:SPLIT`. Also a `datasets.Dataset` or `DatasetDict`.
        output: The folder to write.
        options: How to read records and what to keep. Default: `ConvertOptions()`.
        overwrite: Whether to replace what the folder holds.
        reporter: Receives the progress, as bytes read.
        **fields: Fields of `ConvertOptions` that replace those of `options`.

    Returns:
        What was read, written and quarantined.

    Raises:
        UsageError: If an option is invalid, or the output is in use.
        DataError: If a source cannot be read, is broken, is of no known format or has changed since the interrupted
            run, or if no conversation is left to write.

    Example:
        `convert(["corpus.jsonl.gz"], Path("converted"), roles={"bot": "assistant"})`
    """
    started = time.perf_counter()
    options = replace(options or ConvertOptions(), **fields)
    _check_given(sources)
    format, rules = _reading(options)
    paths = [os.fspath(source) for source in sources if isinstance(source, str | os.PathLike)]
    with (
        open_output(
            output, overwrite=overwrite, inputs=paths, leftovers=JournaledLeftovers(), reporter=reporter
        ) as folder,
        WorkerPool(options.workers or os.cpu_count() or 1, processes=options.processes) as pool,
        kept_memory(),
    ):
        selection = options.selection
        found = find_sources(sources, splits=selection.splits, shares=selection.split)
        apart = selection.splits != MERGE and selection.split is None
        turns = found.turns() if selection.cleaning.dedup and apart else [*enumerate(found.sources)]
        others = [OtherCorpus.find(argument) for argument in selection.against]
        recorded = options.recorded()
        run = {
            "command": "convert",
            "version": __version__,
            "options": recorded,
            "sources": [_identity(source) for source in found.sources],
            "others": [other.identity() for other in others],
        }
        journal = Journal.open(folder, run, restart=overwrite)
        try:
            against = np.concatenate([other.digests(format, rules) for other in others]) if others else None
            job = ConversionJob(folder, selection, against, journal)
            _read_sources([source for _, source in turns], format, rules, job, pool, reporter)
            reports = [
                combine([report for (at, _), report in zip(turns, job.position.reports, strict=True) if at == number])
                for number in range(len(found.sources))
            ]
            _check_archives(found.sources, reports)
            found.check_named(reports)
            job.finish(recorded, reports)
        finally:
            journal.close()
    return ConvertReport(
        output=output,
        read=job.read,
        written=job.written,
        quarantined=dict(sorted(job.reasons.items())),
        duplicates=job.duplicates,
        parts=job.rows_of_parts,
        drawn=selection.split is not None,
        splits=_splits(reports),
        first=job.first,
        sources=tuple(reports),
        ignored_fields=dict(sorted(job.position.ignored.items())),
        notes=(
            *(f"skipped {reason}; this is no known format" for reason in dict.fromkeys(job.position.unknown)),
            *found.notes,
            *job.notes,
            *_split_notes(reports, options),
            *_notes(reports, options),
        ),
        shards=sum(len(part.writer.shards) for part in job.parts),
        seconds=time.perf_counter() - started,
    )


def explain_sources(
    sources: Sequence[str], options: ConvertOptions | None = None, **fields: Any
) -> Iterator[Explanation]:
    """Explain how each source would be read, without writing anything.

    Args:
        sources: As for `convert`.
        options: How to read records. Default: `ConvertOptions()`.
        **fields: Fields of `ConvertOptions` that replace those of `options`.

    Yields:
        One explanation per source.

    Raises:
        UsageError: If an option is invalid.
        DataError: If a source cannot be read or is broken.
    """
    _check_given(sources)
    format, _ = _reading(replace(options or ConvertOptions(), **fields))
    for source in find_sources(sources, splits=MERGE).sources:
        yield explain(source, format)


def _identity(source: AnySource) -> dict[str, Any]:
    """What tells without reading whether a source, and what is read of it, is unchanged."""
    return source.identity() | ({"only": list(source.only)} if source.only is not None else {})


def _check_given(sources: Sequence[Any]) -> None:
    if not sources:
        raise UsageError("no source given; expected files, folders or hub names to convert")


def _reading(options: ConvertOptions) -> tuple[FormatChoice, Rules]:
    """The format to read parts as, and the rules that all formats share. Reads the mapping file."""
    mapping = load_mapping(options.mapping) if options.mapping else None
    roles = role_table({**(mapping.roles if mapping else {}), **options.roles})
    choices = Choices(
        roles=roles,
        assistant=options.assistant or (mapping.assistant if mapping else "second"),
        tree=options.tree,
        preference=options.preference,
    )
    name = str(options.mapping) if options.mapping else options.format
    join = options.join or (mapping is not None and mapping.join)
    rules = Rules(roles=roles, join=join, preference=options.preference)
    return FormatChoice(name=name, corpus_format=mapping, choices=choices), rules


def _read_sources(
    sources: Sequence[AnySource],
    format: FormatChoice,
    rules: Rules,
    job: ConversionJob,
    pool: WorkerPool,
    reporter: Reporter,
) -> None:
    """Read all blocks that the job has not read yet, in order. Raises DataError."""
    total = sum(source.bytes for source in sources)
    done = sum(report.bytes for report in job.position.reports)
    for source in job.position.unread_sources(sources):
        sha256 = None if source.once else pool.submit_thread(source.sha256)
        blocks = SourceBlocks(source, format, partial(_report_progress, reporter, done, total))
        results = map_in_order(
            partial(read_block, rules=rules),
            job.position.unread_blocks(blocks, source.name),
            submit=pool.submit,
            pending=2 * pool.count + 1,  # enough that no worker waits
        )
        for result in results:
            job.add(result, source.name)
        done += source.bytes
        job.position.finish_source(source, blocks, sha256.result() if sha256 else source.sha256())


def _check_archives(sources: Sequence[AnySource], reports: Sequence[SourceReport]) -> None:
    """Raise DataError if all members of a zip archive that the user named are of no known format."""
    formats: dict[Path, set[str]] = {}
    for source, report in zip(sources, reports, strict=True):
        if isinstance(source, FileSource) and source.siblings and not source.from_folder:
            formats.setdefault(source.path, set()).add(report.format)
    for path, found in formats.items():
        if found == {UNKNOWN}:
            raise DataError(f"{path}: found no member of a known format; {expected_format(str(path))}")


def _report_progress(reporter: Reporter, done: int, total: int, here: int) -> None:
    reporter.progress("convert", done + here, total)


def _splits(reports: Sequence[SourceReport]) -> dict[str, tuple[str, ...]]:
    """The splits that the sources name, each with these sources; "" has those of no split, if any is named."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for split in report.splits:
            found.setdefault(split, []).append(report.name)
    return {split: tuple(names) for split, names in in_order(found.items(), itemgetter(0))} if any(found) else {}


def _split_notes(reports: Sequence[SourceReport], options: ConvertOptions) -> Iterator[str]:
    """What the user should know about the splits that were found in the sources, one sentence each."""
    splits, selection = _splits(reports), options.selection
    left_out = sum((Counter(report.left_out) for report in reports), Counter[str]())
    if left_out:
        listed = ", ".join(f"{split} ({count:,} records)" for split, count in left_out.items())
        yield f"left out {listed}"
    several = len({split or TRAIN for split in splits}) > 1
    if several and (selection.splits == MERGE or selection.split is not None):
        listed = ", ".join(f"{split or 'no split'} ({shortened(names)})" for split, names in splits.items())
        yield f"merged the splits {listed}"
    elif several and "" in splits:
        yield f"{shortened(splits[''])}: of no split; written to {TRAIN}"


def _notes(reports: Sequence[SourceReport], options: ConvertOptions) -> list[str]:
    """One sentence per choice that makes no difference to any format that was read."""
    if reports and all(report.format == CONVERTED for report in reports):
        unused = {
            "format": options.format != "auto",
            "mapping": options.mapping is not None,
            "role": bool(options.roles),
            "assistant": options.assistant is not None,
            "tree": options.tree != "all",
            "preference": options.preference is not None,
            "join": options.join,
        }
        return [f"--{name} had no effect: conversations are taken as they are" for name in unused if unused[name]]
    formats = {name for report in reports for name in report.format.split(", ")} & FORMATS.keys()
    given = {
        "assistant": options.assistant is not None,
        "tree": options.tree != "all",
        "preference": options.preference is not None,
    }
    return [
        f"--{name} had no effect: it makes no difference to {', '.join(sorted(formats))}"
        for name in given
        if given[name] and formats and not any(FORMATS[one].depends_on(name) for one in formats)
    ]
