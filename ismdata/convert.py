"""`ismdata convert`: raw corpora of any known format in, one folder of canonical conversations out.

Sources are framed into blocks of complete records in order, the blocks are read side by side, and what comes of them is
written in the order of the sources: neither rows nor bytes depend on the number of workers.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ismdata import __version__
from ismdata.conversation import CONVERSATION_SCHEMA, FORMAT, Quarantined
from ismdata.errors import DataError, UsageError
from ismdata.folders import QUARANTINE_NAME, ShardFile, describe_file, entries, output_folder, write_index
from ismdata.readers import READERS, detect
from ismdata.readers.base import Block, Place, Reader, Refused, shown
from ismdata.readers.blocks import TableBlock
from ismdata.readers.canonical import Rules, role_table
from ismdata.readers.framing import ByteQueue, Framed
from ismdata.readers.layout import JSON_LINES, TEXT_LINES, framing_of, skip_mark
from ismdata.readers.reading import Reading, read_block
from ismdata.readers.sources import SavedDataset, Source, expand

#: A shard is closed once it holds this much.
SHARD_BYTES = 256 << 20
#: Records that detection looks at before it gives up.
_LOOKED_AT = 100

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What was read from one source: `layout` and `format` are what it was taken for."""

    name: str
    bytes: int
    sha256: str | None
    layout: str
    format: str
    records: int


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What `convert` did; `read` = `written` + the sum of `quarantined`. `first`: a refusal of each reason."""

    output: Path
    read: int
    written: int
    quarantined: dict[str, int]
    first: dict[str, Quarantined]
    sources: tuple[SourceReport, ...]
    ignored_fields: dict[str, int]
    shards: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """A source taken for what it is: its blocks, and the format to read them as (None where there are none)."""

    layout: str
    format: str | None
    blocks: Iterable[tuple[Block, Place]]
    position: Callable[[], int]


def convert(
    sources: Sequence[str],
    output: Path,
    *,
    format: str = "auto",
    roles: Mapping[str, str] = MappingProxyType({}),
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Read `sources` and write the folder `output`, complete or not at all.

    `format` is "auto" or a key of READERS. `roles` adds role names to the usual ones. `workers` threads read
    blocks side by side, 0 means one a core. `progress` is called with bytes done and bytes in all.

    Raises UsageError when an option cannot be or the output is in use, DataError when a source cannot be read, is
    broken, is of no known format, or when no conversation at all comes of it.
    """
    started = time.perf_counter()
    if format != "auto" and format not in READERS:
        raise UsageError(f"--format {format}: no such format; expected auto, {', '.join(READERS)}")
    if not sources:
        raise UsageError("no source given; expected files, folders or hub names to convert")
    if workers < 0:
        raise UsageError(f"--workers {workers}: expected 0 (one a core) or more")
    table = role_table(roles)
    threads = workers or os.cpu_count() or 1

    reports: list[SourceReport] = []
    with (
        output_folder(output, overwrite=overwrite, inputs=sources) as folder,
        ThreadPoolExecutor(max_workers=threads) as pool,
    ):
        expanded = [source for argument in sources for source in expand(argument)]
        total, done = sum(source.bytes for source in expanded), 0
        with _Writer(folder) as writer:
            for source in expanded:
                digest = pool.submit(source.sha256)
                before = writer.read
                with _open(source, format) as corpus:
                    reader = READERS[corpus.format] if corpus.format else None
                    if reader is not None:
                        read = partial(_read, reader=reader, rules=Rules(roles=table))
                        for reading in _in_order(pool, read, corpus.blocks, ahead=2 * threads):
                            writer.add(reading)
                            if progress is not None:
                                progress(done + min(corpus.position(), source.bytes), total)
                done += source.bytes
                reports.append(
                    SourceReport(
                        name=source.name,
                        bytes=source.bytes,
                        sha256=digest.result(),
                        layout=corpus.layout,
                        format=corpus.format or "empty",
                        records=writer.read - before,
                    )
                )
            writer.refuse_nothing(reports)
        options = {"format": format, "roles": dict(sorted(roles.items()))}
        write_index(folder, writer.index(reports, options))
    return ConvertReport(
        output=output,
        read=writer.read,
        written=writer.written,
        quarantined=dict(sorted(writer.quarantined.items())),
        first=writer.first,
        sources=tuple(reports),
        ignored_fields=dict(sorted(writer.ignored.items())),
        shards=len(writer.shards),
        seconds=time.perf_counter() - started,
    )


def _read(item: tuple[Block, Place], *, reader: Reader, rules: Rules) -> Reading:
    block, place = item
    return read_block(block, reader, place, rules)


@contextmanager
def _open(source: Source | SavedDataset, format: str) -> Iterator[_Corpus]:
    if isinstance(source, SavedDataset) or source.is_parquet:
        layout = "a dataset" if isinstance(source, SavedDataset) else "Parquet"
        blocks, chosen = _detected(_table_blocks(source), source.name, format)
        yield _Corpus(layout=layout, format=chosen, blocks=blocks, position=lambda: 0)
        return
    with source.open() as (stream, position):
        queue = ByteQueue(stream, source.name)
        skip_mark(queue)
        layout, framing = framing_of(queue, lambda record: detect(record) is not None)
        if format != "auto" and READERS[format].plain_text and layout != TEXT_LINES and queue.data:
            expected = READERS[format].expects
            raise DataError(f"{source.name}: found {layout}; expected {expected}. Leave out --format {format}")
        blocks, chosen = _detected(_line_blocks(framing(queue), source, layout), source.name, format)
        yield _Corpus(layout=layout, format=chosen, blocks=blocks, position=position)


def _line_blocks(framed: Iterable[Framed], source: Source, layout: str) -> Iterator[tuple[Block, Place]]:
    unit = "" if layout in (JSON_LINES, TEXT_LINES) else "record "
    for part in framed:
        prefix, stem = source.name, source.stem
        if part.split is not None:
            prefix, stem = f"{prefix}:{part.split}", f"{stem}-{part.split}"
        yield part.block, Place(prefix=f"{prefix}:{unit}", stem=stem)


def _table_blocks(source: Source | SavedDataset) -> Iterator[tuple[Block, Place]]:
    place = Place(prefix=f"{source.name}:row ", stem=source.stem)
    first = 1
    for table in source.tables():
        if len(table):
            yield TableBlock(rows=table, numbers=np.arange(first, first + len(table))), place
            first += len(table)


def _detected(
    blocks: Iterator[tuple[Block, Place]], name: str, format: str
) -> tuple[Iterable[tuple[Block, Place]], str | None]:
    """The blocks and their format: `format`, or under "auto" that of the first record that looks like one.

    None when there is no record. Raises DataError when no format fits.
    """
    head = list(islice(blocks, 1))
    if not head:
        return head, None
    if format != "auto":
        return chain(head, blocks), format
    block, place = head[0]
    refusal, first = "", None
    for row in range(min(len(block.numbers), _LOOKED_AT)):
        try:
            record = block.record(row)
        except Refused as error:
            refusal = refusal or f"{place.prefix}{block.numbers[row]}: {error.detail}"
            continue
        found = detect(record)
        if found is not None:
            return chain(head, blocks), found
        first = record if first is None else first
    if first is None:
        raise DataError(refusal)
    if isinstance(first, dict):
        seen = f"the first record has the fields {', '.join(map(repr, first)) or '(none)'}"
    else:
        seen = f"the first record is {shown(first)}"
    known = "; ".join(f"{key} ({reader.expects})" for key, reader in READERS.items())
    raise DataError(f"{name}: {seen}; expected one of {known}. Rename the fields, or name the format with --format")


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], *, ahead: int
) -> Iterator[_Result]:
    """`map` over a pool that reads at most `ahead` items more than it has given back."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Writer:
    """The shards and the quarantine of one output folder, and the counts of what went into them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[ShardFile] = []
        self.written = 0
        self.quarantined: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.first: dict[str, Quarantined] = {}
        self._quarantine = (folder / QUARANTINE_NAME).open("wb")
        self._shard: pa.RecordBatchStreamWriter | None = None
        self._rows = self._bytes = 0

    @property
    def read(self) -> int:
        return self.written + self.quarantined.total()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()
        self._quarantine.close()

    def add(self, reading: Reading) -> None:
        for refused in reading.quarantined:
            self.quarantined[refused.reason] += 1
            self.first.setdefault(refused.reason, refused)
            self._quarantine.write(quarantine_line(refused))
        self.ignored.update(reading.ignored)
        if not len(reading.rows):
            return
        if self._shard is None:
            self._shard = pa.ipc.new_stream(self._path(), CONVERSATION_SCHEMA)
        self._shard.write_table(reading.rows)
        self.written += len(reading.rows)
        self._rows += len(reading.rows)
        self._bytes += reading.rows.nbytes
        if self._bytes >= SHARD_BYTES:
            self._close_shard()

    def _path(self) -> Path:
        return self.folder / f"conversations-{len(self.shards):05d}.arrow"

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self.shards.append(describe_file(self._path(), self._rows))
            self._shard, self._rows, self._bytes = None, 0, 0

    def refuse_nothing(self, reports: Sequence[SourceReport]) -> None:
        """Raise DataError when there is no conversation to write."""
        if not self.read:
            names = ", ".join(report.name for report in reports)
            raise DataError(f"{names}: empty, no record found; expected a corpus. See whether it is the right file")
        if not self.written:
            first = next(iter(self.first.values()))
            raise DataError(
                f"{first.source}: {first.detail} (none of {self.read} records can be used; this is the first)"
            )

    def index(self, reports: Sequence[SourceReport], options: Mapping[str, Any]) -> dict[str, Any]:
        """What `index.json` says, once the writer is closed."""
        quarantine = describe_file(self.folder / QUARANTINE_NAME, self.quarantined.total())
        return {
            "format": FORMAT,
            "version": __version__,
            "counts": {
                "read": self.read,
                "written": self.written,
                "quarantined": dict(sorted(self.quarantined.items())),
            },
            "shards": entries(self.shards),
            "quarantine": entries([quarantine])[0],
            "sources": [asdict(report) for report in reports],
            "ignored_fields": dict(sorted(self.ignored.items())),
            "options": dict(options),
        }


def quarantine_line(refused: Quarantined) -> bytes:
    """One line of `quarantine.jsonl`; what UTF-8 cannot hold is escaped, what JSON cannot hold is text."""
    line = refused.as_json()
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line, allow_nan=False).encode("ascii") + b"\n"
    except (ValueError, RecursionError):
        return json.dumps({**line, "record": shown(refused.record)}).encode("ascii") + b"\n"
