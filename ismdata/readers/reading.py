"""One block of records to canonical rows and refusals: the fast road first, the general one for what it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.conversation import CONVERSATION_SCHEMA, Quarantined
from ismdata.readers.base import Block, Reader, Refused
from ismdata.readers.canonical import canonical
from ismdata.readers.columnar import assemble


@dataclass(frozen=True, kw_only=True)
class Place:
    """How the records of a source are called: `prefix` and number say where one stands, `stem` and number name it."""

    prefix: str
    stem: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What came of a block: read = len(rows) + len(quarantined)."""

    rows: pa.Table
    quarantined: list[Quarantined]
    ignored: Counter[str] = field(default_factory=Counter)


def read_block(block: Block, reader: Reader, place: Place, roles: Mapping[str, str]) -> Reading:
    """Rows of CONVERSATION_SCHEMA and refusals, both in the order of the records."""
    columns = reader.columns(block)
    if columns is None:
        return read_records(block, reader, place, roles)
    numbers = pa.array(block.numbers).cast(pa.string())
    sources = pc.binary_join_element_wise(place.prefix, numbers, "")
    own_ids = pc.binary_join_element_wise(f"{place.stem}-", numbers, "")
    rows, care = assemble(columns, roles, sources=sources, own_ids=own_ids)
    if not care.any():
        return Reading(rows=rows, quarantined=[])
    left = np.flatnonzero(care)
    special = read_records(block, reader, place, roles, chosen=left)
    refused = {entry.source for entry in special.quarantined}
    return Reading(
        rows=_woven(rows, left, [sources[int(row)].as_py() not in refused for row in left], special.rows),
        quarantined=special.quarantined,
        ignored=special.ignored,
    )


def _woven(rows: pa.Table, left: Any, used: list[bool], special: pa.Table) -> pa.Table:
    """`rows` with those at `left` replaced by the next of `special` where `used`, and left out elsewhere."""
    pieces, done, taken = [], 0, 0
    for at, replace in zip(left.tolist(), used, strict=True):
        pieces.append(rows.slice(done, at - done))
        if replace:
            pieces.append(special.slice(taken, 1))
            taken += 1
        done = at + 1
    return pa.concat_tables([*pieces, rows.slice(done)]).combine_chunks()


def read_records(
    block: Block, reader: Reader, place: Place, roles: Mapping[str, str], *, chosen: Any = None
) -> Reading:
    """The general road for all records of a block, or for the `chosen` rows of it."""
    rows: list[dict[str, Any]] = []
    quarantined: list[Quarantined] = []
    ignored: Counter[str] = Counter()
    for row in range(len(block.numbers)) if chosen is None else chosen.tolist():
        number = block.numbers[row]
        source = f"{place.prefix}{number}"
        try:
            draft = reader.draft(block.record(row))
            conversation = canonical(draft, roles)
        except Refused as refusal:
            quarantined.append(
                Quarantined(source=source, reason=refusal.reason, detail=refusal.detail, record=block.raw(row))
            )
            continue
        if conversation["id"] is None:
            conversation["id"] = f"{place.stem}-{number}"
        rows.append({**conversation, "source": source})
        ignored.update(draft.ignored)
    return Reading(rows=pa.Table.from_pylist(rows, CONVERSATION_SCHEMA), quarantined=quarantined, ignored=ignored)
