"""One conversion on its way: sources are read in order, cleaned and written, and the journal says how far that is."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata import __version__
from ismdata.concurrency import map_in_order
from ismdata.conversation import FORMAT, Quarantined
from ismdata.convert.canonical import Rules
from ismdata.convert.corpus_format import SourceBlock
from ismdata.convert.digests import digests
from ismdata.convert.filters import Cleaner, Cleaning
from ismdata.convert.parts import EMPTY, FormatChoice, SourceBlocks
from ismdata.convert.read_block import BlockResult, block_checksum, read_block
from ismdata.convert.sampling import SPLIT_NAMES, parse_split, sampled, split_of
from ismdata.convert.sources.source_types import SavedDataset, Source
from ismdata.convert.worker_pool import WorkerPool
from ismdata.data import (
    QUARANTINE_NAME,
    SCRATCH_NAME,
    SPLIT_FORMAT,
    ColumnFile,
    ConversationWriter,
    Journal,
    Quarantine,
    describe_file,
    entries,
    write_index,
)
from ismdata.errors import DataError

#: What is gathered before it is cleaned and written: bytes of rows, or blocks. The shards' batches follow from these.
_BATCH_BYTES, _BATCH_BLOCKS = 1 << 20, 4096


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the conversations that can be used are wanted; all of them where nothing is said.

    sample: how many to draw, by `seed`. split: what share goes to each part, as in "0.98/0.02". against: converted
    folders or sources whose conversations are left out.
    """

    cleaning: Cleaning = field(default_factory=Cleaning)
    against: tuple[str, ...] = ()
    sample: int | None = None
    seed: int = 0
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What was read from one source: `layout` and `format` are what its parts were taken for, `records` conversations.

    `left_aside` names files of a folder or archive that were not read.
    """

    name: str
    bytes: int
    sha256: str | None
    layout: str
    format: str
    records: int
    left_aside: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A folder of conversations that is being written: `name` is empty where there is no split."""

    name: str
    folder: Path
    writer: ConversationWriter


@dataclass(kw_only=True)
class _Mark:
    """How far the sources are read: `reports` of finished ones; of the next one, the blocks, what they hold, and a
    checksum of it. `unknown` says of files of no known format why they were left aside.
    """

    reports: list[SourceReport] = field(default_factory=list)
    blocks: int = 0
    records: int = 0
    checksum: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    drawing: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Mark:
        reports = [SourceReport(**{**one, "left_aside": tuple(one["left_aside"])}) for one in state["reports"]]
        return cls(**{**state, "reports": reports, "ignored": Counter(state["ignored"])})


class ConversionJob:
    """One conversion: the files that are written, and how far they are."""

    def __init__(
        self, folder: Path, selection: Selection, against: NDArray[np.uint64] | None, journal: Journal
    ) -> None:
        state = journal.state or {}
        self.folder, self.selection, self.journal = folder, selection, journal
        self.fractions = parse_split(selection.split) if selection.split else (1.0,)
        self.mark = _Mark.of(state["mark"]) if state else _Mark()
        self.parts = []
        for name in SPLIT_NAMES[: len(self.fractions)] if selection.split else [""]:
            (folder / name).mkdir(exist_ok=True)
            writer = ConversationWriter(folder / name, state["parts"][name] if state else None)
            self.parts.append(_Part(name=name, folder=folder / name, writer=writer))
        self.quarantine = Quarantine(self.parts[0].folder, state.get("quarantine"))
        scratch = folder / SCRATCH_NAME  # goes when the folder is in place
        scratch.mkdir(exist_ok=True)
        self.cleaner = Cleaner(selection.cleaning, scratch, against=against, keep=state.get("cleaner"))
        self.candidates: ConversationWriter | None = None
        if selection.sample is not None:
            self.candidates = ConversationWriter(scratch, state.get("candidates"))
        self.sides = ColumnFile(scratch / "sides", np.int8, keep=state.get("sides", 0))
        self.duplicates = 0
        self._waiting: list[BlockResult] = []
        self._waiting_bytes = 0

    @property
    def written(self) -> int:
        return sum(part.writer.rows for part in self.parts)

    @property
    def read_count(self) -> int:
        return self.written + self.quarantine.reasons.total()

    def read(
        self,
        sources: Sequence[Source | SavedDataset],
        format: FormatChoice,
        rules: Rules,
        workers: WorkerPool,
        progress: Callable[[int, int], None],
    ) -> None:
        """Read the blocks of all sources that are not read yet, and filter and write their conversations.

        Raises DataError.
        """
        total = sum(source.bytes for source in sources)
        done = sum(source.bytes for source in sources[: len(self.mark.reports)])
        for source in [] if self.mark.drawing else sources[len(self.mark.reports) :]:
            digest = None if source.once else workers.submit_thread(source.sha256)
            blocks = SourceBlocks(source, format, partial(_report_progress, progress, done, total))
            results = map_in_order(
                partial(read_block, rules=rules),
                self._unread(blocks, source.name),
                submit=workers.submit,
                pending=2 * workers.count + 1,  # enough that no worker waits
            )
            for result in results:
                self.mark.checksum = _chained(self.mark.checksum, result.checksum)
                self.mark.blocks += 1
                self._add(result)
                if not self._waiting and self.journal.due():
                    self._record()
            done += source.bytes
            self._finish_source(source, blocks, digest.result() if digest else source.sha256())
        self._flush()
        self._refuse_nothing()

    def _finish_source(self, source: Source | SavedDataset, blocks: SourceBlocks, sha256: str | None) -> None:
        """Report a source whose blocks are read, and move the mark to the next one."""
        if blocks.unknown is not None:
            self.mark.unknown.append(blocks.unknown)
        report = SourceReport(
            name=source.name,
            bytes=source.bytes,
            sha256=sha256,
            layout=", ".join(dict.fromkeys(blocks.layouts)) or EMPTY,
            format=", ".join(dict.fromkeys(name for name in blocks.formats if name != EMPTY)) or EMPTY,
            records=self.mark.records,
            left_aside=(*source.skipped, *blocks.skipped),
        )
        reports = [*self.mark.reports, report]
        self.mark = _Mark(reports=reports, ignored=self.mark.ignored, unknown=self.mark.unknown)

    def _unread(self, blocks: Iterable[SourceBlock], name: str) -> Iterator[SourceBlock]:
        """The blocks after those that an earlier run has read. Raises DataError if those have changed."""
        checksum, count, expected = 0, 0, self.mark.blocks
        for block in blocks:
            if count < expected:
                checksum = _chained(checksum, block_checksum(block.block))
                count += 1
                if count < expected:
                    continue
                self._check_unchanged(checksum, name)
            else:
                yield block
        if count < expected:
            self._check_unchanged(None, name)

    def _check_unchanged(self, checksum: int | None, name: str) -> None:
        if checksum != self.mark.checksum:
            raise DataError(
                f"{name}: changed since the run that was interrupted; expected what it had read. "
                "What it had written is removed: run the command again"
            )

    def _add(self, result: BlockResult) -> None:
        """Collect results until they make a batch, so that many small files do not make many small batches."""
        self.mark.ignored.update(result.ignored)
        self.mark.records += len(result.rows) + len(result.quarantined)
        self._waiting.append(result)
        self._waiting_bytes += result.nbytes
        if self._waiting_bytes >= _BATCH_BYTES or len(self._waiting) >= _BATCH_BLOCKS:
            self._flush()

    def _flush(self) -> None:
        """Clean and write what waits."""
        if not self._waiting:
            return
        rows = pa.concat_tables([result.rows for result in self._waiting]).combine_chunks()
        groups = pa.chunked_array([result.split_groups for result in self._waiting]).combine_chunks()
        refused = [one for result in self._waiting for one in result.quarantined]
        self._waiting, self._waiting_bytes = [], 0
        kept, dropped = self.cleaner.apply(rows)
        self.quarantine.add([*refused, *dropped])
        if dropped:
            rows, groups = rows.filter(pa.array(kept)).combine_chunks(), groups.filter(pa.array(kept))
        side = None
        if len(self.parts) > 1:
            side = split_of(digests(rows, roles=False), groups.to_pylist(), self.fractions)
        if self.candidates is None:
            self._write(rows, side)
        else:
            self.candidates.write(rows)
            self.sides.append(np.zeros(len(rows), np.int8) if side is None else side)

    def _write(self, rows: pa.Table, side: NDArray[np.integer] | None) -> None:
        """Write rows to the part that `side` names, int[len(rows)]; None where there is one part."""
        if side is None:
            self.parts[0].writer.write(rows)
            return
        for number, part in enumerate(self.parts):
            part.writer.write(rows.filter(pa.array(side == number)).combine_chunks())

    def _record(self) -> None:
        """Note in the journal how far everything is."""
        writers = [part.writer for part in self.parts] + ([self.candidates] if self.candidates else [])
        files: list[ColumnFile | IO[bytes] | Path] = [file for writer in writers for file in writer.files()]
        files += [*self.quarantine.files(), *self.cleaner.columns.values(), self.sides]
        self.journal.record(
            {
                "mark": {**asdict(self.mark), "ignored": dict(self.mark.ignored)},  # asdict breaks a Counter
                "parts": {part.name: part.writer.state() for part in self.parts},
                "candidates": self.candidates.state() if self.candidates else None,
                "quarantine": self.quarantine.state(),
                "cleaner": {name: column.rows for name, column in self.cleaner.columns.items()},
                "sides": self.sides.rows,
            },
            files,
        )

    def _draw(self, size: int) -> None:
        """The sample: of the candidates, as many as are asked for are written, the others are counted out."""
        assert self.candidates is not None
        self.candidates.close()
        if not self.mark.drawing:
            self.mark.drawing = True
            self._record()
        self.sides.close()
        sides = self.sides.map()
        drawn = sampled(self.candidates.rows, size, self.selection.seed)
        detail = f"not among the {size:,} that were drawn of {self.candidates.rows:,}"
        first = 0
        for rows in self.candidates.read_back():
            here = slice(first, first + len(rows))
            first += len(rows)
            chosen = drawn[here]
            left = rows["source"].filter(pa.array(~chosen)).to_pylist()
            self.quarantine.add(
                [Quarantined(source=at, reason="not_sampled", detail=detail, record=None) for at in left]
            )
            side = None if len(self.parts) == 1 else sides[here][chosen]
            self._write(rows.filter(pa.array(chosen)).combine_chunks(), side)

    def finish(self, options: Mapping[str, Any]) -> None:
        """Close all files and write the indexes. Raises DataError where a part of a split is left empty."""
        if self.selection.sample is not None:
            self._draw(self.selection.sample)
        for part in self.parts:
            part.writer.close()
            if not part.writer.rows:
                raise DataError(
                    f"--split {self.selection.split}: none of {self.written} conversations falls to {part.name}; "
                    "expected some in each part. Give it a larger share, or leave out --split"
                )
        self.quarantine.close()
        self.duplicates = self.cleaner.duplicates()
        self.sides.close()
        for part in self.parts:
            write_index(part.folder, self._index(part, options))
        if len(self.parts) > 1:
            parts = {part.name: part.writer.rows for part in self.parts}
            counts = self._counts(self.written, self.quarantine.reasons)
            index = {"format": SPLIT_FORMAT, "version": __version__, "counts": counts, "parts": parts}
            write_index(self.folder, {**index, "options": dict(options)})

    def _index(self, part: _Part, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the `index.json` of a part says. What was refused stands with the first part of a split."""
        reasons = self.quarantine.reasons if part is self.parts[0] else Counter[str]()
        if part is not self.parts[0]:
            (part.folder / QUARANTINE_NAME).touch()
        return {
            "format": FORMAT,
            "version": __version__,
            "counts": self._counts(part.writer.rows, reasons),
            "duplicates": self.duplicates,
            "shards": entries(part.writer.shards),
            "quarantine": entries([describe_file(part.folder / QUARANTINE_NAME, reasons.total())])[0],
            "sources": [asdict(report) for report in self.mark.reports],
            "ignored_fields": dict(sorted(self.mark.ignored.items())),
            "options": {**options, **({"part": part.name} if part.name else {})},
        }

    def _counts(self, written: int, reasons: Counter[str]) -> dict[str, Any]:
        return {"read": written + reasons.total(), "written": written, "quarantined": dict(sorted(reasons.items()))}

    def _refuse_nothing(self) -> None:
        """Raise DataError when there is no conversation to write."""
        kept = self.written + (self.candidates.rows if self.candidates else 0)
        if kept:
            return
        if not self.quarantine.reasons and self.mark.unknown:
            raise DataError(self.mark.unknown[0])
        if not self.quarantine.reasons:
            names = ", ".join(report.name for report in self.mark.reports)
            raise DataError(f"{names}: empty, no record found; expected a corpus. See whether it is the right file")
        first = next(iter(self.quarantine.first.values()))
        read = self.quarantine.reasons.total()
        raise DataError(f"{first.source}: {first.detail} (none of {read} records can be used; this is the first)")


def _report_progress(progress: Callable[[int, int], None], done: int, total: int, here: int) -> None:
    progress(done + here, total)


def _chained(before: int, checksum: int) -> int:
    """The checksum of a sequence of blocks, from that of the earlier ones and that of the next."""
    return zlib.crc32(checksum.to_bytes(4, "little"), before)
