"""The output of a conversion: conversations are filtered, sampled, split and written; the rest is quarantined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata import __version__
from ismdata.conversation import FORMAT, Quarantined
from ismdata.convert.digests import Digests, digests
from ismdata.convert.filters import Cleaner
from ismdata.convert.options import Selection
from ismdata.convert.parts import expected_format
from ismdata.convert.position import Position
from ismdata.convert.read_block import BlockResult
from ismdata.convert.sampling import SPLIT_NAMES, draw_sample, parse_split, split_numbers
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

#: A batch is filtered and written at this many bytes of rows, or blocks. The record batches of shards follow from it.
_BATCH_BYTES, _BATCH_BLOCKS = 1 << 20, 4096


@dataclass(frozen=True, kw_only=True)
class SplitPart:
    """A folder that is being written: a part of a split, or with an empty `name` the whole output."""

    name: str
    folder: Path
    writer: ConversationWriter


class ConversionJob:
    """The output of one conversion, and the journal that records how far it is.

    Args:
        folder: The unfinished output folder.
        selection: Which conversations to write.
        against: uint64[N, 2], the digests of conversations that are dropped; None drops none.
        journal: The journal in `folder`. The job resumes after its last record.
    """

    def __init__(self, folder: Path, selection: Selection, against: Digests | None, journal: Journal) -> None:
        state = journal.state or {}
        self.folder, self.selection, self.journal = folder, selection, journal
        self.shares = parse_split(selection.split) if selection.split else (1.0,)
        self.position = Position.from_state(state["position"]) if state else Position()
        self.parts = []
        for name in SPLIT_NAMES[: len(self.shares)] if selection.split else [""]:
            (folder / name).mkdir(exist_ok=True)
            writer = ConversationWriter(folder / name, state["parts"][name] if state else None)
            self.parts.append(SplitPart(name=name, folder=folder / name, writer=writer))
        self.quarantine = Quarantine(self.parts[0].folder, state.get("quarantine"))
        scratch = folder / SCRATCH_NAME  # removed when the output is complete
        scratch.mkdir(exist_ok=True)
        self.cleaner = Cleaner(selection.cleaning, scratch, against=against, keep=state.get("cleaner"))
        #: With `--sample`: the conversations that the sample is drawn from.
        self.candidates: ConversationWriter | None = None
        if selection.sample is not None:
            self.candidates = ConversationWriter(scratch, state.get("candidates"))
        #: With `--sample`: the number of the split part of each candidate, int8.
        self.candidate_parts = ColumnFile(scratch / "parts", np.int8, keep=state.get("candidate_parts", 0))
        self.duplicates = 0
        self._pending: list[BlockResult] = []
        self._pending_bytes = 0

    @property
    def written(self) -> int:
        """Conversations written so far."""
        return sum(part.writer.rows for part in self.parts)

    @property
    def read(self) -> int:
        """Conversations written or quarantined so far."""
        return self.written + self.quarantine.reasons.total()

    def add(self, result: BlockResult) -> None:
        """Take the conversations of the next block, and record the state in the journal if it is time to.

        They are written in batches, so that many small files do not make many small record batches.
        """
        self.position.advance(result)
        self._pending.append(result)
        self._pending_bytes += result.nbytes
        if self._pending_bytes >= _BATCH_BYTES or len(self._pending) >= _BATCH_BLOCKS:
            self._flush()
        if not self._pending and self.journal.due():
            self._record()

    def _flush(self) -> None:
        """Filter and write the pending conversations."""
        if not self._pending:
            return
        rows = pa.concat_tables([result.rows for result in self._pending]).combine_chunks()
        groups = pa.chunked_array([result.split_groups for result in self._pending]).combine_chunks()
        refused = [one for result in self._pending for one in result.quarantined]
        self._pending, self._pending_bytes = [], 0
        kept, dropped = self.cleaner.apply(rows)
        self.quarantine.add([*refused, *dropped])
        if dropped:
            rows, groups = rows.filter(pa.array(kept)).combine_chunks(), groups.filter(pa.array(kept))
        numbers = None
        if len(self.parts) > 1:
            numbers = split_numbers(digests(rows, roles=False), groups.to_pylist(), self.shares)
        if self.candidates is None:
            self._write(rows, numbers)
        else:
            self.candidates.write(rows)
            self.candidate_parts.append(np.zeros(len(rows), np.int8) if numbers is None else numbers)

    def _write(self, rows: pa.Table, numbers: NDArray[np.integer] | None) -> None:
        """Write each row to the split part with the given number, int[len(rows)]; None if there is one part."""
        if numbers is None:
            self.parts[0].writer.write(rows)
            return
        for number, part in enumerate(self.parts):
            part.writer.write(rows.filter(pa.array(numbers == number)).combine_chunks())

    def _record(self) -> None:
        """Record in the journal how far all files are."""
        writers = [part.writer for part in self.parts] + ([self.candidates] if self.candidates else [])
        files: list[ColumnFile | IO[bytes] | Path] = [file for writer in writers for file in writer.files()]
        files += [*self.quarantine.files(), *self.cleaner.columns.values(), self.candidate_parts]
        self.journal.record(
            {
                "position": self.position.state(),
                "parts": {part.name: part.writer.state() for part in self.parts},
                "candidates": self.candidates.state() if self.candidates else None,
                "quarantine": self.quarantine.state(),
                "cleaner": {name: column.rows for name, column in self.cleaner.columns.items()},
                "candidate_parts": self.candidate_parts.rows,
            },
            files,
        )

    def finish(self, options: Mapping[str, Any]) -> None:
        """Write the pending conversations, the sample and the indexes, and close all files.

        Args:
            options: The options of the run, for the indexes.

        Raises:
            DataError: If no conversation is left to write, or none in a part of a split.
        """
        self._flush()
        self._check_not_empty()
        if self.selection.sample is not None:
            self._write_sample(self.selection.sample)
        for part in self.parts:
            part.writer.close()
            if not part.writer.rows:
                raise DataError(
                    f"--split {self.selection.split}: {part.name} has none of the {self.written} conversations; "
                    "expected some in each part. Give it a larger share, or leave out --split"
                )
        self.quarantine.close()
        self.duplicates = self.cleaner.duplicates()
        self.candidate_parts.close()
        for part in self.parts:
            write_index(part.folder, self._index(part, options))
        if len(self.parts) > 1:
            parts = {part.name: part.writer.rows for part in self.parts}
            counts = self._counts(self.written, self.quarantine.reasons)
            index = {"format": SPLIT_FORMAT, "version": __version__, "counts": counts, "parts": parts}
            write_index(self.folder, {**index, "options": dict(options)})

    def _check_not_empty(self) -> None:
        """Raise DataError if there is no conversation to write."""
        if self.written or (self.candidates is not None and self.candidates.rows):
            return
        if not self.quarantine.reasons and self.position.unknown:
            unknown = self.position.unknown[0]
            raise DataError(f"{unknown}; {expected_format(unknown.partition(': ')[0])}")
        if not self.quarantine.reasons:
            names = ", ".join(report.name for report in self.position.reports)
            raise DataError(f"{names}: found no record; expected a corpus. Check that it is the right file")
        first = next(iter(self.quarantine.first.values()))
        read = self.quarantine.reasons.total()
        raise DataError(f"{first.source}: {first.detail} (the first of {read} records, none of which can be used)")

    def _write_sample(self, size: int) -> None:
        """Write `size` of the candidates and quarantine the others."""
        assert self.candidates is not None
        self.candidates.close()
        if not self.position.complete:
            self.position.complete = True
            self._record()
        self.candidate_parts.close()
        numbers = self.candidate_parts.map()
        drawn = draw_sample(self.candidates.rows, size, self.selection.seed)
        detail = f"not among the {size:,} conversations drawn from {self.candidates.rows:,}"
        first = 0
        for rows in self.candidates.read_back():
            here = slice(first, first + len(rows))
            first += len(rows)
            chosen = drawn[here]
            others = rows["source"].filter(pa.array(~chosen)).to_pylist()
            self.quarantine.add(
                Quarantined(source=source, reason="not_sampled", detail=detail, record=None) for source in others
            )
            self._write(
                rows.filter(pa.array(chosen)).combine_chunks(),
                None if len(self.parts) == 1 else numbers[here][chosen],
            )

    def _index(self, part: SplitPart, options: Mapping[str, Any]) -> dict[str, Any]:
        """The `index.json` of a part. The first part of a split has the quarantine."""
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
            "sources": [asdict(report) for report in self.position.reports],
            "ignored_fields": dict(sorted(self.position.ignored.items())),
            "options": {**options, **({"part": part.name} if part.name else {})},
        }

    def _counts(self, written: int, reasons: Counter[str]) -> dict[str, Any]:
        return {"read": written + reasons.total(), "written": written, "quarantined": dict(sorted(reasons.items()))}
