"""What must hold of whatever bytes are read as a corpus, down to canonical rows.

Used by `tests/hostile/test_fuzz.py` and by `benchmarks/fuzz.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ismdata.conversation import CONVERSATION_SCHEMA, REASONS, ROLES
from ismdata.convert.canonical import Rules
from ismdata.convert.corpus_format import Block, CorpusFormat, Place, SourceBlock
from ismdata.convert.digests import digests
from ismdata.convert.json_values import parse_json
from ismdata.convert.parts import FormatChoice, open_parts
from ismdata.convert.read_block import read_block, read_records
from ismdata.convert.sources.archives import Part, parts_of
from ismdata.convert.sources.blocks import ValueBlock
from ismdata.convert.sources.grouping import GroupBlock
from ismdata.data.quarantine import quarantine_line
from ismdata.errors import DataError

PLACE = Place(prefix="x:", stem="x")


def check_block(block: Block, place: Place, corpus_format: CorpusFormat, rules: Rules) -> None:
    """Raises AssertionError if the fast and the general path differ, a record is lost, or a row breaks the schema."""
    fast = read_block(SourceBlock(block, place, corpus_format), rules)
    general = read_records(SourceBlock(block, place, corpus_format), rules)
    rows = fast.rows.to_pylist()
    assert rows == general.rows.to_pylist(), "the two paths give different rows"
    assert repr(fast.quarantined) == repr(general.quarantined), "the two paths refuse different records"
    assert fast.ignored == general.ignored and fast.split_groups.to_pylist() == general.split_groups.to_pylist()
    places = {row["source"] for row in rows} | {one.source for one in fast.quarantined}
    assert {f"{place.prefix}{number}" for number in block.numbers} <= places, "a record is neither written nor refused"
    fast.rows.validate(full=True)
    assert fast.rows.schema.equals(CONVERSATION_SCHEMA)
    for row in rows:
        check_row(row)
    for roles in (True, False):
        assert len(digests(fast.rows, roles=roles)) == len(fast.rows)
    for one in fast.quarantined:
        assert one.reason in REASONS, one.reason
        assert one.detail
        assert json.loads(quarantine_line(one))["source"] == one.source


def check_row(row: dict[str, Any]) -> None:
    assert row["id"] and row["source"] and row["messages"]
    assert row["tools"] is None or isinstance(parse_json(row["tools"]), list)
    assert row["meta"] is None or isinstance(parse_json(row["meta"]), dict)
    for message in row["messages"]:
        assert message["role"] in ROLES
        assert message["content"] is not None or message["tool_calls"] is not None
        assert message["weight"] is None or 0 <= message["weight"] < 3.5e38
        if message["tool_calls"] is not None:
            assert all(call["function"]["name"] for call in parse_json(message["tool_calls"]))
        elif message["role"] == "assistant":
            assert message["content"].strip()


def check_grouping(corpus_format: CorpusFormat, values: list[Any]) -> None:
    """Every row is in exactly one group, whichever blocks it comes in."""
    half = len(values) // 2
    blocks = [
        (ValueBlock(values=part, numbers=np.arange(first, first + len(part))), PLACE)
        for first, part in ((1, values[:half]), (half + 1, values[half:]))
    ]
    seen: list[int] = []
    for block, _ in corpus_format.regroup(iter(blocks)):
        if isinstance(block, GroupBlock):
            seen += [int(inner.numbers[row]) for group in block.groups for inner, row in group.rows]
        else:
            seen += block.numbers.tolist()
    assert sorted(seen) == list(range(1, len(values) + 1)), "rows are lost or doubled"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes as a source."""

    data: bytes
    name: str = "x"
    split: str | None = None
    only: tuple[str, ...] | None = None
    held_out: bool | None = None

    def parts(self) -> Generator[Part, None, list[str]]:
        stream: Any = io.BufferedReader(io.BytesIO(self.data))
        size = len(self.data)
        return (yield from parts_of(stream, name=self.name, stem="x", position=lambda: 0, packed=lambda: size))


def check_file(data: bytes, name: str, format: FormatChoice, rules: Rules) -> None:
    try:
        for part in open_parts(Memory(data=data, name=name), format):  # type: ignore[arg-type]
            for block, place, corpus_format in part.blocks:
                check_block(block, place, corpus_format, rules)
    except DataError as error:
        assert str(error)
