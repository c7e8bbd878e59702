"""One conversion on its way: sources are read in order, cleaned and written, and the journal says how far that is."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
from ismdata.convert.corpus_format import CorpusFormat
from ismdata.convert.digests import digests
from ismdata.convert.filters import Cleaner, Cleaning
from ismdata.convert.parts import EMPTY, UNKNOWN, FormatChoice, Placed, ResultIterator, UnknownFormat, opened
from ismdata.convert.read_block import BlockResult, read_block
from ismdata.convert.sampling import SPLIT_NAMES, parse_split, sampled, split_of
from ismdata.convert.sources.arguments import FileSource, SavedDataset, Source
from ismdata.convert.sources.blocks import LineBlock
from ismdata.convert.worker_pool import Workers
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
        workers: Workers,
        progress: Callable[[int, int], None],
    ) -> None:
        """Read what is not read yet of all sources, block by block, and write what comes of it. Raises DataError."""
        total = sum(source.bytes for source in sources)
        done = sum(source.bytes for source in sources[: len(self.mark.reports)])
        for source in [] if self.mark.drawing else sources[len(self.mark.reports) :]:
            digest = None if source.once else workers.submit_thread(source.sha256)
            seen: list[tuple[str, str]] = []
            blocks = ResultIterator(self._blocks(source, format, seen, partial(_further, progress, done, total)))
            unread = self._unread(blocks, source.name)
            # Enough blocks are pending that no worker waits.
            results = map_in_order(
                partial(_read, rules=rules), unread, submit=workers.submit, pending=2 * workers.count + 1
            )
            for read in results:
                self.mark.checksum = _chained(self.mark.checksum, read.checksum)
                self.mark.blocks += 1
                self._add(read.reading)
                if not self._waiting and self.journal.due():
                    self._record()
            done += source.bytes
            layouts = dict.fromkeys(layout for layout, _ in seen)
            formats = dict.fromkeys(name for _, name in seen if name != EMPTY)
            report = SourceReport(
                name=source.name,
                bytes=source.bytes,
                sha256=digest.result() if digest else source.sha256(),
                layout=", ".join(layouts) or EMPTY,
                format=", ".join(formats) or EMPTY,
                records=self.mark.records,
                left_aside=(*source.passed_over, *blocks.result),
            )
            reports = [*self.mark.reports, report]
            self.mark = _Mark(reports=reports, ignored=self.mark.ignored, unknown=self.mark.unknown)
        self._flush()
        self._refuse_nothing()

    def _blocks(
        self,
        source: Source | SavedDataset,
        format: FormatChoice,
        seen: list[tuple[str, str]],
        progress: Callable[[int], None],
    ) -> Generator[_Sorted, None, list[str]]:
        """The blocks of all parts of a source; layout and format of each part go to `seen`.

        Returns the names of what was not read. A file that was not named but found in a folder is left aside when its
        first part is of no known format.
        """
        parts = ResultIterator(opened(source, format))
        try:
            for part in parts:
                seen.append((part.layout, part.format))
                if part.corpus_format is not None:
                    for placed in part.blocks:
                        yield part.corpus_format, placed
                        progress(min(part.position(), source.bytes))
        except UnknownFormat as error:
            if seen or not (isinstance(source, FileSource) and source.found):
                raise
            seen.append((UNKNOWN, UNKNOWN))
            self.mark.unknown.append(f"left aside: {error}")
            return [source.name]
        return parts.result

    def _unread(self, blocks: Iterable[_Sorted], name: str) -> Iterator[_Sorted]:
        """The blocks after those that an earlier run has read, which must be what they were. Raises DataError."""
        checksum, count, expected = 0, 0, self.mark.blocks
        for one in blocks:
            if count < expected:
                checksum = _chained(checksum, _checksum(one[1]))
                count += 1
                if count < expected:
                    continue
                self._check_unchanged(checksum, name)
            else:
                yield one
        if count < expected:
            self._check_unchanged(None, name)

    def _check_unchanged(self, checksum: int | None, name: str) -> None:
        if checksum != self.mark.checksum:
            raise DataError(
                f"{name}: changed since the run that was interrupted; expected what it had read. "
                "What it had written is removed: run the command again"
            )

    def _add(self, reading: BlockResult) -> None:
        """Take what came of a block; small blocks are gathered, so that many small files make no small batches."""
        self.mark.ignored.update(reading.ignored)
        self.mark.records += len(reading.rows) + len(reading.quarantined)
        self._waiting.append(reading)
        self._waiting_bytes += reading.rows.nbytes
        if self._waiting_bytes >= _BATCH_BYTES or len(self._waiting) >= _BATCH_BLOCKS:
            self._flush()

    def _flush(self) -> None:
        """Clean and write what waits."""
        if not self._waiting:
            return
        rows = pa.concat_tables([reading.rows for reading in self._waiting]).combine_chunks()
        kin = pa.chunked_array([reading.kin for reading in self._waiting]).combine_chunks()
        refused = [one for reading in self._waiting for one in reading.quarantined]
        self._waiting, self._waiting_bytes = [], 0
        kept, dropped = self.cleaner.apply(rows)
        self.quarantine.add([*refused, *dropped])
        if dropped:
            rows, kin = rows.filter(pa.array(kept)).combine_chunks(), kin.filter(pa.array(kept))
        side = None
        if len(self.parts) > 1:
            side = split_of(digests(rows, roles=False), kin.to_pylist(), self.fractions)
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
            raise DataError(self.mark.unknown[0].removeprefix("left aside: "))
        if not self.quarantine.reasons:
            names = ", ".join(report.name for report in self.mark.reports)
            raise DataError(f"{names}: empty, no record found; expected a corpus. See whether it is the right file")
        first = next(iter(self.quarantine.first.values()))
        read = self.quarantine.reasons.total()
        raise DataError(f"{first.source}: {first.detail} (none of {read} records can be used; this is the first)")


#: A block with the format that parses it.
_Sorted = tuple[CorpusFormat, Placed]


def _further(progress: Callable[[int, int], None], done: int, total: int, here: int) -> None:
    progress(done + here, total)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What came of a block, and the checksum of the block."""

    reading: BlockResult
    checksum: int

    @property
    def nbytes(self) -> int:
        return int(self.reading.rows.nbytes)


def _read(one: _Sorted, *, rules: Rules) -> _Read:
    corpus_format, (block, place) = one
    return _Read(reading=read_block(block, corpus_format, place, rules), checksum=_checksum((block, place)))


def _checksum(placed: Placed) -> int:
    """Of the text of a block; what is no text is told by the size and time of its file alone."""
    block = placed[0]
    return zlib.crc32(block.data) if isinstance(block, LineBlock) else 0


def _chained(before: int, checksum: int) -> int:
    return zlib.crc32(checksum.to_bytes(4, "little"), before)
