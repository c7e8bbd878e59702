"""A source taken for what it is: its parts, each with layout, format and blocks of records."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from ismdata.convert.corpus_format import Block, Choices, CorpusFormat, Place, with_choices
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.convert.sources.archives import Part
from ismdata.convert.sources.arguments import SavedDataset, Source
from ismdata.convert.sources.blocks import TableBlock
from ismdata.convert.sources.detect_framing import LINE_LAYOUTS, TEXT_LINES, framing_of, skip_mark
from ismdata.convert.sources.framing import ByteQueue, Framed
from ismdata.errors import DataError, Refused, shown

Item = TypeVar("Item")
Result = TypeVar("Result")

Placed = tuple[Block, Place]

#: What a part is called that holds no record.
EMPTY = "empty"
#: What a file of a folder is called that is left aside, for it is of no known format.
UNKNOWN = "unknown"
#: Fields that tell a format although the list in them is empty.
_EMPTY_LISTS = {"messages": "messages", "conversations": "sharegpt"}
#: Records that detection looks at before it gives up.
_LOOKED_AT = 100


class UnknownFormat(DataError):
    """No record of a part looks like one of any format."""


@dataclass(frozen=True, kw_only=True)
class FormatChoice:
    """What parts are read as: `name` is "auto", a key of FORMATS, or the name of `corpus_format` if given."""

    name: str = "auto"
    corpus_format: CorpusFormat | None = None
    choices: Choices

    def is_record(self, record: object) -> bool:
        if self.name == "auto":
            return detect(record) is not None
        return self._named.matches(record)

    @property
    def _named(self) -> CorpusFormat:
        return self.corpus_format or FORMATS[self.name]

    def format_for(self, record: object) -> tuple[str, CorpusFormat] | None:
        """Name and format of a record, None if no format matches; a given name wins whatever the record is."""
        name = detect(record) if self.name == "auto" else self.name
        if name is None:
            return None
        return name, with_choices(FORMATS[name] if self.name == "auto" else self._named, self.choices)


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One part of a source. `format` is EMPTY and `corpus_format` None where it holds no record."""

    name: str
    layout: str
    format: str
    corpus_format: CorpusFormat | None
    blocks: Iterable[Placed]
    position: Callable[[], int]


class ResultIterator(Generic[Item, Result]):
    """Iterates over a generator and keeps its return value: `result` is there after the last item."""

    result: Result

    def __init__(self, generator: Generator[Item, None, Result]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[Item]:
        self.result = yield from self._generator


def opened(source: Source | SavedDataset, format: FormatChoice) -> Generator[SourcePart, None, list[str]]:
    """The parts of a source, one after the other: each is to be read to its end before the next is asked for.

    Returns the names of what is in the source and was not read.
    Raises DataError when a part cannot be read, UnknownFormat when it is of no known format.
    """
    if isinstance(source, SavedDataset):
        yield _known(_table_blocks(source), source.name, "a dataset", format, lambda: 0)
        return []
    parts = ResultIterator(source.parts())
    for part in parts:
        if part.is_parquet:
            yield _known(_table_blocks(part), part.name, "Parquet", format, part.position)
            continue
        queue = ByteQueue(part.stream, part.name)
        skip_mark(queue)
        layout, framing = framing_of(queue, format.is_record)
        _check_layout(part.name, layout, format, queue)
        yield _known(_line_blocks(framing(queue), part, layout), part.name, layout, format, part.position)
    return parts.result


def _check_layout(name: str, layout: str, format: FormatChoice, queue: ByteQueue) -> None:
    if format.name in FORMATS and FORMATS[format.name].plain_text and layout != TEXT_LINES and queue.data:
        expected = FORMATS[format.name].expects
        raise DataError(f"{name}: found {layout}; expected {expected}. Leave out --format {format.name}")


def _line_blocks(framed: Iterable[Framed], part: Part, layout: str) -> Iterator[Placed]:
    unit = "" if layout in LINE_LAYOUTS else "record "
    for one in framed:
        prefix, stem = part.name, part.stem
        if one.split is not None:
            prefix, stem = f"{prefix}:{one.split}", f"{stem}-{one.split}"
        yield one.block, Place(prefix=f"{prefix}:{unit}", stem=stem)


def _table_blocks(source: Part | SavedDataset) -> Iterator[Placed]:
    place = Place(prefix=f"{source.name}:row ", stem=source.stem)
    first = 1
    for table in source.tables():
        if len(table):
            _check_table(table, f"{source.name}: rows {first} to {first + len(table) - 1}")
            yield TableBlock(rows=table, numbers=np.arange(first, first + len(table))), place
            first += len(table)


def _check_table(table: pa.Table, place: str) -> None:
    """Raises DataError for texts that are no UTF-8: who reads Parquet or Arrow files takes their word for it."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{place}: {error}; expected texts in UTF-8. Write the file again from its source") from error


def _known(
    blocks: Iterator[Placed], name: str, layout: str, format: FormatChoice, position: Callable[[], int]
) -> SourcePart:
    """The part with the format of its first record that is of one. Raises UnknownFormat when none is."""
    head = list(islice(blocks, 1))
    if not head:
        return SourcePart(name=name, layout=layout, format=EMPTY, corpus_format=None, blocks=(), position=position)
    found = _detected(head[0], name, format)
    regrouped = found[1].regroup(chain(head, blocks))
    return SourcePart(
        name=name, layout=layout, format=found[0], corpus_format=found[1], blocks=regrouped, position=position
    )


def _detected(placed: Placed, name: str, format: FormatChoice) -> tuple[str, CorpusFormat]:
    if format.name != "auto":
        found = format.format_for(None)
        assert found is not None
        return found
    block, place = placed
    refusal, others = "", []
    for row in range(min(len(block.numbers), _LOOKED_AT)):
        try:
            record = block.record(row)
        except Refused as error:
            refusal = refusal or f"{place.prefix}{block.numbers[row]}: {error.detail}"
            continue
        found = format.format_for(record)
        if found is not None:
            return found
        others.append(record)
    if not others:
        raise DataError(refusal)
    first = others[0]
    if isinstance(first, dict):
        for field, known_name in _EMPTY_LISTS.items():
            if first.get(field) == []:
                return known_name, with_choices(FORMATS[known_name], format.choices)
        seen = f"the first record has the fields {', '.join(map(repr, first)) or '(none)'}"
    else:
        seen = f"the first record is {shown(first)}"
    known = "; ".join(f"{key} ({corpus_format.expects})" for key, corpus_format in FORMATS.items())
    raise UnknownFormat(
        f"{name}: {seen}; expected one of {known}. Say how to read it with --mapping FILE: "
        f"`ismdata convert --explain {name}` writes one to start from"
    )
