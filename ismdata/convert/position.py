"""How far the sources have been read, so that the same command resumes after an interruption."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from ismdata.convert.corpus_format import SourceBlock
from ismdata.convert.parts import EMPTY, SourceBlocks
from ismdata.convert.read_block import BlockResult, block_checksum
from ismdata.convert.sources.source_types import AnySource
from ismdata.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What was read from one source.

    Attributes:
        name: The source.
        bytes: Its size; that of the whole file for a member of a zip archive.
        sha256: The hash of these bytes, None for a dataset from the hub.
        layout: How its records are framed, such as "JSON Lines".
        format: The names of the formats of its parts.
        records: The conversations in it, those that were quarantined included.
        left_aside: Names of files of its folder or archive that were not read.
        splits: The conversations of each split that it names; those of no split under "".
        left_out: The records of splits that `--splits` or `SOURCE:SPLIT` leaves out.
    """

    name: str
    bytes: int
    sha256: str | None
    layout: str
    format: str
    records: int
    left_aside: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def entry(self, records: int) -> dict[str, Any]:
        """The source as an index lists it, with the number of its records in that folder."""
        listed = asdict(self)
        del listed["splits"], listed["left_out"]
        return {**listed, "records": records}


@dataclass(kw_only=True)
class Position:
    """The position in the sources, in order.

    Attributes:
        reports: The sources that have been read completely.
        blocks: How many blocks of the next source have been read.
        records: The conversations in these blocks.
        splits: The same by split.
        checksum: The checksum of these blocks.
        ignored: How many message fields of all sources have been dropped, by name.
        unknown: Why files of no known format were skipped, one sentence each.
        complete: Whether all sources have been read.
    """

    reports: list[SourceReport] = field(default_factory=list)
    blocks: int = 0
    records: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    checksum: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Position:
        """The position that `state` described."""
        reports = [SourceReport(**{**one, "left_aside": tuple(one["left_aside"])}) for one in state["reports"]]
        return cls(
            **{**state, "reports": reports, "ignored": Counter(state["ignored"]), "splits": Counter(state["splits"])}
        )

    def state(self) -> dict[str, Any]:
        """The position as JSON values."""
        # asdict cannot copy a Counter
        return {**asdict(self), "ignored": dict(self.ignored), "splits": dict(self.splits)}

    def unread_sources(self, sources: Sequence[Item]) -> Sequence[Item]:
        """The sources that have not been read completely."""
        return [] if self.complete else sources[len(self.reports) :]

    def unread_blocks(self, blocks: Iterable[SourceBlock], name: str) -> Iterator[SourceBlock]:
        """The blocks of the next source that have not been read. Raises DataError if the others have changed."""
        checksum, count, expected = 0, 0, self.blocks
        for block in blocks:
            if count == expected:
                yield block
                continue
            checksum = _chain(checksum, block_checksum(block.records))
            count += 1
            if count == expected:
                self._check_unchanged(checksum, name)
        if count < expected:
            self._check_unchanged(None, name)

    def _check_unchanged(self, checksum: int | None, name: str) -> None:
        if checksum != self.checksum:
            raise DataError(
                f"{name}: found other records than the interrupted run; expected the same. The file has changed since. "
                "The unfinished output is removed: run the same command again"
            )

    def advance(self, result: BlockResult) -> None:
        """Move behind one more block."""
        self.blocks += 1
        self.checksum = _chain(self.checksum, result.checksum)
        records = len(result.rows) + len(result.quarantined)
        self.records += records
        self.splits[result.split or ""] += records
        self.ignored.update(result.ignored)

    def finish_source(self, source: AnySource, blocks: SourceBlocks, sha256: str | None) -> None:
        """Report a source whose blocks have been read, and move to the start of the next one."""
        self.unknown += [error.found for error in blocks.unknown]
        self.reports.append(
            SourceReport(
                name=source.name,
                bytes=source.bytes,
                sha256=sha256,
                layout=", ".join(dict.fromkeys(blocks.layouts)) or EMPTY,
                format=", ".join(dict.fromkeys(name for name in blocks.formats if name != EMPTY)) or EMPTY,
                records=self.records,
                left_aside=(*source.skipped, *blocks.skipped),
                splits=dict(self.splits),
                left_out=dict(blocks.left_out),
            )
        )
        self.blocks = self.records = self.checksum = 0
        self.splits = Counter()


def combine(reports: Sequence[SourceReport]) -> SourceReport:
    """The report of a source that was read in several turns, from the report of each."""
    last = reports[-1]
    if len(reports) == 1:
        return last
    names = {
        name: ", ".join(dict.fromkeys(getattr(one, name) for one in reports if getattr(one, name) != EMPTY)) or EMPTY
        for name in ("layout", "format")
    }
    return replace(
        last,
        layout=names["layout"],
        format=names["format"],
        records=sum(one.records for one in reports),
        left_aside=tuple(dict.fromkeys(name for one in reports for name in one.left_aside)),
        splits=dict(sum((Counter(one.splits) for one in reports), Counter())),
        left_out=dict(sum((Counter(one.left_out) for one in reports), Counter())),
    )


def _chain(before: int, checksum: int) -> int:
    """The checksum of a sequence of blocks, from that of the earlier ones and that of the next."""
    return zlib.crc32(checksum.to_bytes(4, "little"), before)
