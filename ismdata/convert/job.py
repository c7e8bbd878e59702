"""The output of a conversion: conversations are filtered, sampled, split and written; the rest is quarantined.

If the sources name one split or none, the output is one folder. Else each split has a folder inside it, with its own
shards, quarantine and index. The first split is written to the output itself and moved when all others are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from ismdata.convert.position import Position, SourceReport
from ismdata.convert.read_block import BlockResult
from ismdata.convert.sampling import SPLIT_NAMES, draw_sample, parse_split, split_numbers
from ismdata.convert.sources.find import MERGE, check_unmixed
from ismdata.convert.sources.splits import TRAIN, in_order
from ismdata.data import (
    INDEX_NAME,
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


@dataclass(kw_only=True)
class SplitPart:
    """A folder that is being written: one split, or with an empty `name` the whole output."""

    name: str
    folder: Path
    writer: ConversationWriter
    quarantine: Quarantine
    #: Splits without conversations, whose quarantine it has too.
    emptied: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, folder: Path, state: Mapping[str, Any] | None) -> SplitPart:
        """Start or resume a part in `folder`."""
        folder.mkdir(exist_ok=True)
        state = state or {}
        writer, quarantine = (
            ConversationWriter(folder, state.get("writer")),
            Quarantine(folder, state.get("quarantine")),
        )
        return cls(name=name, folder=folder, writer=writer, quarantine=quarantine)

    def state(self) -> dict[str, Any]:
        """What a later run needs to resume here, as JSON."""
        return {"writer": self.writer.state(), "quarantine": self.quarantine.state()}

    def close(self) -> None:
        """Finish the files."""
        self.writer.close()
        self.quarantine.close()


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
        #: The shares of a split that is drawn; None if splits are as the sources name them.
        self.shares = parse_split(selection.split) if selection.split else None
        self.position = Position.from_state(state["position"]) if state else Position()
        #: The splits that were found, each with the first source that names it.
        self.found: dict[str, str] = state.get("found", {})
        scratch = folder / SCRATCH_NAME  # removed when the output is complete
        scratch.mkdir(exist_ok=True)
        names = SPLIT_NAMES[: len(self.shares)] if self.shares else [*state.get("parts", [])]
        if not self.shares:
            self._undo_moves(names)
        self.parts: list[SplitPart] = []
        for name in names:
            self._open_part(name, state["parts"][name] if state else None)
        self.cleaner = Cleaner(selection.cleaning, scratch, against=against, keep=state.get("cleaner"))
        #: With `--sample`: the conversations that the sample is drawn from.
        self.candidates: ConversationWriter | None = None
        if selection.sample is not None:
            self.candidates = ConversationWriter(scratch, state.get("candidates"))
        #: With `--sample`: the number of the part of each candidate, int16.
        self.candidate_parts = ColumnFile(scratch / "parts", np.int16, keep=state.get("candidate_parts", 0))
        self.duplicates = 0
        #: Conversations in each split, by the name of its folder; empty if the output is one folder.
        self.rows_of_parts: dict[str, int] = {}
        self.notes: list[str] = []
        self._pending: list[BlockResult] = []
        self._pending_bytes = 0

    @property
    def written(self) -> int:
        """Conversations written so far."""
        return sum(part.writer.rows for part in self.parts)

    @property
    def reasons(self) -> Counter[str]:
        """Quarantined records by reason so far."""
        return sum((part.quarantine.reasons for part in self.parts), Counter())

    @property
    def first(self) -> dict[str, Quarantined]:
        """The first refusal of each reason so far."""
        refusals: dict[str, Quarantined] = {}
        for part in self.parts:
            refusals = {**part.quarantine.first, **refusals}
        return refusals

    @property
    def read(self) -> int:
        """Conversations written or quarantined so far."""
        return self.written + self.reasons.total()

    def add(self, result: BlockResult, source: str) -> None:
        """Take the conversations of the next block, and record the state in the journal if it is time to.

        They are written in batches, so that many small files do not make many small record batches.

        Raises:
            UsageError: If a second split is found that `--split` would mix with the first.
        """
        self.position.advance(result)
        self.found.setdefault(result.split or TRAIN, source)
        if self.shares and self.selection.splits != MERGE:
            check_unmixed(self.found.items(), str(self.selection.split))
        self._part_number(result)
        self._pending.append(result)
        self._pending_bytes += result.nbytes
        if self._pending_bytes >= _BATCH_BYTES or len(self._pending) >= _BATCH_BLOCKS:
            self._flush()
        if not self._pending and self.journal.due():
            self._record()

    def _open_part(self, name: str, state: Mapping[str, Any] | None) -> None:
        at_top = not self.shares and not self.parts
        self.parts.append(SplitPart.open(name, self.folder if at_top else self.folder / name, state))

    def _part_number(self, result: BlockResult) -> int:
        """The number of the part that a block belongs to, which is opened if it is new; 0 if splits are drawn."""
        if self.shares:
            return 0
        name = "" if self.selection.splits == MERGE else result.split or TRAIN
        for number, part in enumerate(self.parts):
            if part.name == name:
                return number
        self._open_part(name, None)
        return len(self.parts) - 1

    def _flush(self) -> None:
        """Filter and write the pending conversations."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        rows = pa.concat_tables([result.rows for result in pending]).combine_chunks()
        of_result = [self._part_number(result) for result in pending]
        numbers = np.repeat(of_result, [len(result.rows) for result in pending])
        kept, dropped = self.cleaner.apply(rows)
        for number, part in enumerate(self.parts):
            here = [result for result, its in zip(pending, of_result, strict=True) if its == number]
            part.quarantine.add(one for result in here for one in result.quarantined)
        self._quarantine(dropped, numbers[~kept])
        if self.shares:
            groups = pa.chunked_array([result.split_groups for result in pending]).combine_chunks()
            groups, rows = groups.filter(pa.array(kept)), rows.filter(pa.array(kept)).combine_chunks()
            numbers = split_numbers(digests(rows, roles=False), groups.to_pylist(), self.shares)
        elif dropped:
            rows, numbers = rows.filter(pa.array(kept)).combine_chunks(), numbers[kept]
        if self.candidates is None:
            self._write(rows, numbers)
        else:
            self.candidates.write(rows)
            self.candidate_parts.append(numbers.astype(np.int16))

    def _quarantine(self, refused: Sequence[Quarantined], numbers: NDArray[np.integer]) -> None:
        """Quarantine records with the parts of these numbers, int[len(refused)]."""
        for number, part in enumerate(self.parts):
            part.quarantine.add(one for one, its in zip(refused, numbers.tolist(), strict=True) if its == number)

    def _write(self, rows: pa.Table, numbers: NDArray[np.integer]) -> None:
        """Write each row to the part with the given number, int[len(rows)]."""
        if len(self.parts) == 1:
            self.parts[0].writer.write(rows)
            return
        for number, part in enumerate(self.parts):
            part.writer.write(rows.filter(pa.array(numbers == number)).combine_chunks())

    def _record(self) -> None:
        """Record in the journal how far all files are."""
        writers = [part.writer for part in self.parts] + ([self.candidates] if self.candidates else [])
        files: list[ColumnFile | IO[bytes] | Path] = [file for writer in writers for file in writer.files()]
        files += [file for part in self.parts for file in part.quarantine.files()]
        files += [*self.cleaner.columns.values(), self.candidate_parts]
        self.journal.record(
            {
                "position": self.position.state(),
                "found": self.found,
                "parts": {part.name: part.state() for part in self.parts},
                "candidates": self.candidates.state() if self.candidates else None,
                "cleaner": {name: column.rows for name, column in self.cleaner.columns.items()},
                "candidate_parts": self.candidate_parts.rows,
            },
            files,
        )

    def finish(self, options: Mapping[str, Any], reports: Sequence[SourceReport]) -> None:
        """Write the pending conversations, the sample and the indexes, and close all files.

        Args:
            options: The options of the run, for the indexes.
            reports: What was read from each source, for the indexes.

        Raises:
            DataError: If no conversation is left to write, or none in a part of a split that is drawn.
        """
        self._flush()
        self._check_not_empty()
        if self.selection.sample is not None:
            self._write_sample(self.selection.sample)
        for part in self.parts:
            part.close()
            if self.shares and not part.writer.rows:
                raise DataError(
                    f"--split {self.selection.split}: {part.name} has none of the {self.written} conversations; "
                    "expected some in each part. Give it a larger share, or leave out --split"
                )
        self.duplicates = self.cleaner.duplicates()
        self.candidate_parts.close()
        if len(self.parts) == 1:
            write_index(self.folder, self._index(self.parts[0], reports, options))
            return
        if not self.shares:
            self._move_parts()
        for part in self.parts:
            write_index(part.folder, self._index(part, reports, {**options, "part": part.name}))
        self.rows_of_parts = parts = {part.name: part.writer.rows for part in self.parts}
        counts = self._counts(self.written, self.reasons)
        index = {"format": SPLIT_FORMAT, "version": __version__, "counts": counts, "parts": parts}
        write_index(self.folder, {**index, "options": dict(options)})

    def _check_not_empty(self) -> None:
        """Raise DataError if there is no conversation to write."""
        reasons = self.reasons
        if self.written or (self.candidates is not None and self.candidates.rows):
            return
        if not reasons and self.position.unknown:
            unknown = self.position.unknown[0]
            raise DataError(f"{unknown}; {expected_format(unknown.partition(': ')[0])}")
        if not reasons:
            names = ", ".join(dict.fromkeys(report.name for report in self.position.reports))
            raise DataError(f"{names}: found no record; expected a corpus. Check that it is the right file")
        first = next(iter(self.first.values()))
        raise DataError(
            f"{first.source}: {first.detail} (the first of {reasons.total()} records, none of which can be used)"
        )

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
            others = [
                Quarantined(source=source, reason="not_sampled", detail=detail, record=None)
                for source in rows["source"].filter(pa.array(~chosen)).to_pylist()
            ]
            # Where splits are drawn, the first part has the quarantine.
            self._quarantine(others, numbers[here][~chosen] * (self.shares is None))
            self._write(rows.filter(pa.array(chosen)).combine_chunks(), numbers[here][chosen])

    # ---- splits that the sources name ----

    def _move_parts(self) -> None:
        """Move the first part to its own folder, and put aside the parts without conversations.

        The quarantine of such a part is appended to that of the first other one. The files of all parts are closed.
        """
        first = self.parts[0]
        self._move_files(first, self.folder / first.name)
        kept = [part for part in in_order(self.parts, lambda part: part.name) if part.writer.rows]
        for part in self.parts:
            if part.writer.rows:
                continue
            into = kept[0]
            with (into.folder / QUARANTINE_NAME).open("ab") as file:
                file.write((part.folder / QUARANTINE_NAME).read_bytes())
            into.emptied.append(part.name)
            into.quarantine.reasons += part.quarantine.reasons
            into.quarantine.first = {**part.quarantine.first, **into.quarantine.first}
            number = part.quarantine.reasons.total()
            self.notes.append(
                f"{part.name}: none of its {number:,} records can be used; {into.name}/{QUARANTINE_NAME} lists them"
            )
            part.folder.replace(self._aside(part.name))
        self.parts = kept

    def _aside(self, name: str) -> Path:
        return self.folder / SCRATCH_NAME / f"part-{name}"

    def _move_files(self, part: SplitPart, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in [*(shard.name for shard in part.writer.shards), QUARANTINE_NAME]:
            (part.folder / name).replace(folder / name)
        part.folder = folder

    def _undo_moves(self, names: Sequence[str]) -> None:
        """Undo what an interrupted `_move_parts` did with the parts of these names, the first one first."""
        for name in names:
            if self._aside(name).is_dir():
                self._aside(name).replace(self.folder / name)
        first = self.folder / names[0] if names and names[0] else None
        if first is None or not first.is_dir():
            return
        for path in first.iterdir():
            if path.name == INDEX_NAME:
                path.unlink()
            else:
                path.replace(self.folder / path.name)
        first.rmdir()

    # ---- indexes ----

    def _index(self, part: SplitPart, reports: Sequence[SourceReport], options: Mapping[str, Any]) -> dict[str, Any]:
        """The `index.json` of a part."""
        reasons = part.quarantine.reasons
        quarantine = describe_file(part.folder / QUARANTINE_NAME, reasons.total())
        return {
            "format": FORMAT,
            "version": __version__,
            "counts": self._counts(part.writer.rows, reasons),
            "duplicates": self.duplicates,
            "shards": entries(part.writer.shards),
            "quarantine": entries([quarantine])[0],
            "sources": list(self._sources(part, reports)),
            "ignored_fields": dict(sorted(self.position.ignored.items())),
            "options": dict(options),
        }

    def _sources(self, part: SplitPart, reports: Sequence[SourceReport]) -> Iterator[dict[str, Any]]:
        """The sources of a part, as its index lists them; those without records are listed in the first part."""
        for report in reports:
            if self.shares or len(self.parts) == 1:
                yield report.entry(report.records)
                continue
            names = {part.name, *part.emptied}
            records = sum(count for split, count in report.splits.items() if (split or TRAIN) in names)
            if records or (not any(report.splits.values()) and part is self.parts[0]):
                yield report.entry(records)

    def _counts(self, written: int, reasons: Counter[str]) -> dict[str, Any]:
        return {"read": written + reasons.total(), "written": written, "quarantined": dict(sorted(reasons.items()))}
