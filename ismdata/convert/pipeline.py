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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from ismdata.convert.parts import UNKNOWN, FormatChoice, SourceBlocks, expected_format
from ismdata.convert.position import SourceReport
from ismdata.convert.read_block import read_block
from ismdata.convert.sources.arguments import expand, with_unique_stems
from ismdata.convert.sources.source_types import FileSource, SavedDataset, Source
from ismdata.convert.worker_pool import WorkerPool
from ismdata.data import Journal, JournaledLeftovers, open_output
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError
from ismdata.memory import kept_memory


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` did. All counts are of conversations.

    Attributes:
        output: The folder that was written.
        read: `written` + all of `quarantined`.
        written: Conversations in the shards.
        quarantined: Refused and dropped conversations, by reason.
        duplicates: Conversations that are the same as an earlier one, whether written or not.
        parts: Conversations in each part of a split, by the name of its folder; empty without `--split`.
        first: The first refusal of each reason.
        sources: What was read from each source.
        ignored_fields: How many message fields were dropped, by name.
        notes: What the user should know and is no error, one sentence each.
        shards: Number of shards.
        seconds: Wall time.
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
    options: ConvertOptions | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter = LOGGED,
    **fields: Any,
) -> ConvertReport:
    """Convert raw corpora to one folder of conversations.

    The folder is written completely or not at all. If it is interrupted, the same call resumes.

    Args:
        sources: Files, archives, folders, globs, hub names of datasets, or "-" for standard input.
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
    with (
        open_output(
            output, overwrite=overwrite, inputs=sources, leftovers=JournaledLeftovers(), reporter=reporter
        ) as folder,
        WorkerPool(options.workers or os.cpu_count() or 1, processes=options.processes) as pool,
        kept_memory(),
    ):
        expanded = with_unique_stems([source for argument in sources for source in expand(argument)])
        others = [OtherCorpus.find(argument) for argument in options.selection.against]
        recorded = options.recorded()
        run = {
            "command": "convert",
            "version": __version__,
            "options": recorded,
            "sources": [source.identity() for source in expanded],
            "others": [other.identity() for other in others],
        }
        journal = Journal.open(folder, run, restart=overwrite)
        try:
            against = np.concatenate([other.digests(format, rules) for other in others]) if others else None
            job = ConversionJob(folder, options.selection, against, journal)
            _read_sources(expanded, format, rules, job, pool, reporter)
            _check_archives(expanded, job.position.reports)
            job.finish(recorded)
        finally:
            journal.close()
    return ConvertReport(
        output=output,
        read=job.read,
        written=job.written,
        quarantined=dict(sorted(job.quarantine.reasons.items())),
        duplicates=job.duplicates,
        parts={part.name: part.writer.rows for part in job.parts if part.name},
        first=job.quarantine.first,
        sources=tuple(job.position.reports),
        ignored_fields=dict(sorted(job.position.ignored.items())),
        notes=(
            *(f"skipped {reason}; this is no known format" for reason in job.position.unknown),
            *_notes(job.position.reports, options),
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
    for argument in sources:
        for source in expand(argument):
            yield explain(source, format)


def _check_given(sources: Sequence[str]) -> None:
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
    sources: Sequence[Source | SavedDataset],
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
            job.add(result)
        done += source.bytes
        job.position.finish_source(source, blocks, sha256.result() if sha256 else source.sha256())


def _check_archives(sources: Sequence[Source | SavedDataset], reports: Sequence[SourceReport]) -> None:
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


def _notes(reports: Sequence[SourceReport], options: ConvertOptions) -> list[str]:
    """One sentence per choice that makes no difference to any format that was read."""
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
