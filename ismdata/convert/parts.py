"""Open a source: find its parts, the layout and format of each, and its blocks of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from ismdata.convert.corpus_format import Block, Choices, CorpusFormat, Place, SourceBlock, with_choices
from ismdata.convert.formats.known_shapes import known_shape
from ismdata.convert.formats.preference import KTO, LABELLED
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.convert.sources.archives import Part
from ismdata.convert.sources.blocks import ConversationBlock, TableBlock
from ismdata.convert.sources.detect_framing import (
    CHAT_LOG,
    LINE_LAYOUTS,
    SPLITS,
    TEXT_LINES,
    detect_layout,
    skip_byte_order_mark,
)
from ismdata.convert.sources.framing import ByteQueue, Framed
from ismdata.convert.sources.source_types import AnySource, ConvertedSource, FileSource, SavedDataset, Source
from ismdata.convert.sources.splits import TRAIN, is_held_out, is_named, split_of_name, splits_of_files
from ismdata.errors import DataError, Refused, shown

Item = TypeVar("Item")
Result = TypeVar("Result")

#: The format that is reported for a part without records.
EMPTY = "empty"
#: The format that is reported for a converted folder.
CONVERTED = "conversations"
#: The layout and format that are reported for a skipped file of no known format.
UNKNOWN = "unknown"
#: Fields that decide the format even if the list in them is empty.
_EMPTY_LISTS = {"messages": "messages", "conversations": "sharegpt"}
#: Records that are tried before detection gives up.
_DETECTION_RECORDS = 100


#: The most names of fields in a message, and the most characters of each.
_SHOWN_FIELDS, _SHOWN_NAME = 8, 40


def expected_format(name: str) -> str:
    """What is expected instead of the file `name`, which is of no known format, and what to do."""
    return (
        "expected a known format, see docs/formats.md. "
        f"`ismdata convert --explain {name.partition('!')[0]}` writes a draft of a mapping file that describes the "
        "format: check it and pass it with --mapping"
    )


class UnknownFormat(DataError):
    """No record of a part matches any format. `name` is the part, `found` the message without the advice."""

    def __init__(self, name: str, record: Any) -> None:
        seen = f"has the fields {listed_fields(record)}" if isinstance(record, dict) else f"is {shown(record)}"
        self.name, self.found = name, f"{name}: the first record {seen}"
        shape = known_shape(record)
        super().__init__(f"{self.found}; {expected_format(name)}" if shape is None else f"{self.found}. {shape}")


@dataclass(frozen=True, kw_only=True)
class FormatChoice:
    """The format to read parts as.

    Attributes:
        name: "auto", a key of FORMATS, or the name of `corpus_format` if that is given.
        corpus_format: A format that is not in FORMATS, such as a mapping.
        choices: What the user decides where the data leave it open.
    """

    name: str = "auto"
    corpus_format: CorpusFormat | None = None
    choices: Choices

    def is_record(self, record: object) -> bool:
        """Whether a value is a record of the chosen format, or of any if the format is to be detected."""
        if self.name == "auto":
            return detect(record) is not None
        return self._named.matches(record)

    @property
    def _named(self) -> CorpusFormat:
        return self.corpus_format or FORMATS[self.name]

    def format_for(self, record: object) -> tuple[str, CorpusFormat] | None:
        """Name and format of a record, None if no format matches. A chosen format is used whatever the record is."""
        name = detect(record) if self.name == "auto" else self.name
        if name is None:
            return None
        return name, with_choices(FORMATS[name] if self.name == "auto" else self._named, self.choices)


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One part of a source: a file, a member of an archive or a dataset.

    Attributes:
        name: Where it is, for messages and the `source` of conversations.
        layout: How its records are framed, such as "JSON Lines".
        format: The name of its format, EMPTY if it has no records.
        corpus_format: The format with the user's choices, None if the part has no records.
        blocks: Its records, in order. Read them before the next part is opened.
        position: Returns how many bytes of the source's file have been read.
    """

    name: str
    layout: str
    format: str
    corpus_format: CorpusFormat | None
    blocks: Iterable[SourceBlock]
    position: Callable[[], int]


class ResultIterator(Generic[Item, Result]):
    """Iterates over a generator and keeps its return value in `result`, which is set after the last item."""

    result: Result

    def __init__(self, generator: Generator[Item, None, Result]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[Item]:
        self.result = yield from self._generator


class SourceBlocks:
    """Iterates over the blocks of all parts of a source, in order.

    Parts of no known format that were found in a folder or an archive are skipped. The attributes are complete after
    the last block.

    Attributes:
        layouts: The layout of each part.
        formats: The format of each part.
        skipped: Names of what the source holds and was not read.
        unknown: Why parts were skipped.
        left_out: The records of splits that are not read, by split.
    """

    def __init__(self, source: AnySource, format: FormatChoice, progress: Callable[[int], None]) -> None:
        self.layouts: list[str] = []
        self.formats: list[str] = []
        self.skipped: list[str] = []
        self.unknown: list[UnknownFormat] = []
        self.left_out: Counter[str] = Counter()
        self._source, self._format, self._progress = source, format, progress

    def __iter__(self) -> Iterator[SourceBlock]:
        parts = ResultIterator(open_parts(self._source, self._format, self.unknown, self.left_out))
        for part in parts:
            self.layouts.append(part.layout)
            self.formats.append(part.format)
            for block in part.blocks:
                yield block
                self._progress(min(part.position(), self._source.bytes))
        self.skipped = parts.result
        if self.unknown and not self.formats:
            self.layouts, self.formats = [UNKNOWN], [UNKNOWN]


def open_parts(
    source: AnySource,
    format: FormatChoice,
    unknown: list[UnknownFormat] | None = None,
    left_out: Counter[str] | None = None,
) -> Generator[SourcePart, None, list[str]]:
    """Open the parts of a source, one at a time.

    Args:
        source: The source.
        format: The format to read it as.
        unknown: Receives the errors of parts that are skipped. None skips none.
        left_out: Counts the records of splits that are not read.

    Yields:
        Its parts. Read the blocks of one before the next is taken.

    Returns:
        Names of what the source holds and was not read.

    Raises:
        UnknownFormat: If no record of a part matches any format and the part is not skipped, or if all parts of an
            archive that the user named would be.
        DataError: If a part cannot be read.
    """
    if isinstance(source, ConvertedSource):
        yield _converted_part(source)
        return []
    if isinstance(source, SavedDataset):
        blocks = _table_blocks(source, source.split)
        yield _source_part(_chosen(blocks, source, left_out), source.name, "a dataset", format, lambda: 0)
        return []
    found = isinstance(source, FileSource) and source.found
    skipped: list[UnknownFormat] = []
    any_read = False
    parts = ResultIterator(source.parts())
    for part in parts:
        try:
            opened = _open_part(part, source, format, left_out)
        except UnknownFormat as error:
            if unknown is None or (part.name == source.name and not found):
                raise
            part.stream.close()
            skipped.append(error)
            continue
        any_read = True
        if opened is not None:
            yield opened
    if skipped and not any_read and not found:
        raise skipped[0]
    if unknown is not None:
        unknown += skipped
    return [*parts.result, *(error.name for error in skipped)]


def _open_part(part: Part, source: Source, format: FormatChoice, left_out: Counter[str] | None) -> SourcePart | None:
    """A part with its layout and format, None if this turn does not read it.

    Raises UnknownFormat if no record matches any, DataError if it is broken.
    """
    split = _split_of_member(part.name[len(source.name) + 1 :]) or source.split
    turn = (None, is_held_out(split or TRAIN))
    this_turn = not isinstance(source, FileSource) or source.held_out in turn
    if part.is_parquet and not this_turn:
        return None
    if part.is_parquet:
        blocks = _chosen(_table_blocks(part, split), source, left_out)
        return _source_part(blocks, part.name, "Parquet", format, part.position)
    queue = ByteQueue(part.stream, part.name)
    skip_byte_order_mark(queue)
    layout, framing = detect_layout(queue, format.is_record)
    if not this_turn and layout != SPLITS:
        return None
    _check_layout(part.name, layout, format, queue)
    blocks = _chosen(_line_blocks(framing(queue), part, layout, split), source, left_out)
    return _source_part(blocks, part.name, layout, format, part.position)


def _check_layout(name: str, layout: str, format: FormatChoice, queue: ByteQueue) -> None:
    """Raise DataError if the chosen format reads lines of text and the file has another layout."""
    if (
        format.name in FORMATS
        and FORMATS[format.name].plain_text
        and layout not in (TEXT_LINES, CHAT_LOG)
        and queue.data
    ):
        expected = FORMATS[format.name].expects
        raise DataError(f"{name}: found {layout}; expected {expected}. Leave out --format {format.name}")


def _split_of_member(name: str) -> str | None:
    """The split that the name of an archive's member means."""
    place = [part for part in PurePosixPath(name.replace("!", "/")).parts if part != "/"]
    return splits_of_files([place]).splits[0] if place else None


def _chosen(
    blocks: Iterable[tuple[Block, Place]], source: AnySource, left_out: Counter[str] | None
) -> Iterator[tuple[Block, Place]]:
    """The blocks of the splits that are read; the records of the others are counted in `left_out`."""
    for block, place in blocks:
        split = place.split or TRAIN
        if isinstance(source, FileSource) and source.held_out not in (None, is_held_out(split)):
            continue
        if source.only is None or is_named(split, source.only):
            yield block, place
        elif left_out is not None:
            left_out[split] += len(block.numbers)


def _line_blocks(framed: Iterable[Framed], part: Part, layout: str, split: str | None) -> Iterator[tuple[Block, Place]]:
    unit = "" if layout in LINE_LAYOUTS else "record "
    for one in framed:
        prefix, stem = part.name, part.stem
        if one.split is not None:
            prefix, stem = f"{prefix}:{one.split}", f"{stem}-{one.split}"
        inner = split if one.split is None else split_of_name(one.split) or split
        yield one.block, Place(prefix=f"{prefix}:{unit}", stem=stem, split=inner)


def _converted_part(source: ConvertedSource) -> SourcePart:
    """The conversations of a converted folder, which need no format."""
    place = Place(prefix=f"{source.name}:row ", stem="", split=source.split)

    def blocks() -> Iterator[SourceBlock]:
        first = 0
        for table in source.tables():
            _check_table(table, f"{source.name}: rows {first} to {first + len(table) - 1}")
            numbers = np.arange(first, first + len(table))
            yield SourceBlock(ConversationBlock(rows=table, numbers=numbers), place, FORMATS["messages"])
            first += len(table)

    return SourcePart(
        name=source.name,
        layout="a converted folder",
        format=CONVERTED,
        corpus_format=None,
        blocks=blocks(),
        position=lambda: 0,
    )


def _table_blocks(source: Part | SavedDataset, split: str | None) -> Iterator[tuple[Block, Place]]:
    place = Place(prefix=f"{source.name}:row ", stem=source.stem, split=split)
    first = 1
    for table in source.tables():
        if len(table):
            _check_table(table, f"{source.name}: rows {first} to {first + len(table) - 1}")
            yield TableBlock(rows=table, numbers=np.arange(first, first + len(table))), place
            first += len(table)


def _check_table(table: pa.Table, place: str) -> None:
    """Raise DataError for texts that are not UTF-8: the readers of Parquet and Arrow files do not check them."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{place}: {error}; expected texts in UTF-8. Write the file again from its source") from error


def _source_part(
    blocks: Iterator[tuple[Block, Place]],
    name: str,
    layout: str,
    format: FormatChoice,
    position: Callable[[], int],
) -> SourcePart:
    """The part with the format that its first records have. Raises UnknownFormat if none matches."""
    head = list(islice(blocks, 1))
    if not head:
        return SourcePart(name=name, layout=layout, format=EMPTY, corpus_format=None, blocks=(), position=position)
    format_name, corpus_format = _detect_format(*head[0], name, format)
    return SourcePart(
        name=name,
        layout=layout,
        format=format_name,
        corpus_format=corpus_format,
        blocks=(SourceBlock(*one, corpus_format) for one in corpus_format.regroup(chain(head, blocks))),
        position=position,
    )


def _detect_format(block: Block, place: Place, name: str, format: FormatChoice) -> tuple[str, CorpusFormat]:
    """Name and format of the first record that matches one. Raises UnknownFormat, or DataError if none can be read."""
    if format.name != "auto":
        chosen = format.format_for(None)
        assert chosen is not None
        return chosen
    refusal, others = "", []
    rows = min(len(block.numbers), _DETECTION_RECORDS)
    for row in range(rows):
        try:
            record = block.record(row)
        except Refused as error:
            refusal = refusal or f"{place.prefix}{block.numbers[row]}: {error.detail}"
            continue
        found = format.format_for(record)
        if found is not None:
            return _labelled_format(found, block, range(row + 1, rows), format.choices)
        others.append(record)
    if not others:
        raise DataError(refusal)
    first = others[0]
    if isinstance(first, dict):
        for field, known_name in _EMPTY_LISTS.items():
            if first.get(field) == []:
                return known_name, with_choices(FORMATS[known_name], format.choices)
    raise UnknownFormat(name, first)


def listed_fields(record: Mapping[Any, Any]) -> str:
    """The names of a record's fields for a message: the first ones, and how many more there are.

    >>> listed_fields({"id": 1, "text": ""}), listed_fields({})
    ("'id', 'text'", '(none)')
    """
    names = [repr(name if len(str(name)) <= _SHOWN_NAME else f"{str(name)[:_SHOWN_NAME]}…") for name in record]
    more = f" and {len(names) - _SHOWN_FIELDS:,} more" if len(names) > _SHOWN_FIELDS else ""
    return (", ".join(names[:_SHOWN_FIELDS]) or "(none)") + more


def _labelled_format(
    found: tuple[str, CorpusFormat], block: Block, rows: Iterable[int], choices: Choices
) -> tuple[str, CorpusFormat]:
    """`kto` instead of a format of its records if one of these rows has a label: it may be missing in the first."""
    if FORMATS[found[0]] not in LABELLED:
        return found
    if any(_is_labelled(block, row) for row in rows):
        return "kto", with_choices(KTO, choices)
    return found


def _is_labelled(block: Block, row: int) -> bool:
    try:
        return KTO.matches(block.record(row))
    except Refused:
        return False
