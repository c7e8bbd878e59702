"""One block of records to canonical rows and refusals: the fast road first, the general one for what it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.conversation import CONVERSATION_SCHEMA, Quarantined
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.columnar import assemble
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place
from ismdata.errors import Refused


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What came of a block: read = len(rows) + len(quarantined), in conversations.

    `kin` is string[len(rows)]: what a split must keep on one side with the row, null where it is the row alone.
    """

    rows: pa.Table
    kin: pa.Array
    quarantined: list[Quarantined]
    ignored: Counter[str] = field(default_factory=Counter)


def read_block(block: Block, corpus_format: CorpusFormat, place: Place, rules: Rules) -> BlockResult:
    """Rows of CONVERSATION_SCHEMA and refusals, both in the order of the records."""
    columns = corpus_format.parse_block(block)
    if columns is None:
        return read_records(block, corpus_format, place, rules)
    numbers = pa.array(block.numbers).cast(pa.string())
    sources = pc.binary_join_element_wise(place.prefix, numbers, "")
    own_ids = pc.binary_join_element_wise(f"{place.stem}-", numbers, "")
    rows, care = assemble(columns, rules, sources=sources, own_ids=own_ids)
    ignored = +Counter({name: int(counts[~care].sum()) for name, counts in columns.ignored.items()})
    if not care.any():
        return BlockResult(rows=rows, kin=pa.nulls(len(rows), pa.string()), quarantined=[], ignored=ignored)
    left = np.flatnonzero(care)
    special, counts = _read(block, corpus_format, place, rules, left.tolist())
    rows = rows.append_column("kin", pa.nulls(len(rows), pa.string()))
    woven = _woven(rows, left.tolist(), counts, special.rows.append_column("kin", special.kin))
    return BlockResult(
        rows=woven.drop_columns("kin"),
        kin=woven["kin"].combine_chunks(),
        quarantined=special.quarantined,
        ignored=ignored + special.ignored,
    )


def _woven(rows: pa.Table, left: Sequence[int], counts: Sequence[int], special: pa.Table) -> pa.Table:
    """`rows` with the one at each place of `left` replaced by the next `counts` rows of `special`."""
    pieces, done, taken = [], 0, 0
    for at, count in zip(left, counts, strict=True):
        pieces += [rows.slice(done, at - done), special.slice(taken, count)]
        taken += count
        done = at + 1
    return pa.concat_tables([*pieces, rows.slice(done)]).combine_chunks()


def read_records(block: Block, corpus_format: CorpusFormat, place: Place, rules: Rules) -> BlockResult:
    """The general road for all records of a block."""
    return _read(block, corpus_format, place, rules, range(len(block.numbers)))[0]


def _read(
    block: Block, corpus_format: CorpusFormat, place: Place, rules: Rules, chosen: Sequence[int]
) -> tuple[BlockResult, list[int]]:
    """The general road for the `chosen` records of a block, and how many rows came of each."""
    rows: list[dict[str, Any]] = []
    kin: list[str | None] = []
    quarantined: list[Quarantined] = []
    ignored: Counter[str] = Counter()
    counts = []
    for row in chosen:
        number, before = block.numbers[row], len(rows)
        source = f"{place.prefix}{number}"

        def refuse(refusal: Refused, row: int = row, source: str = source) -> None:
            quarantined.append(
                Quarantined(source=source, reason=refusal.reason, detail=refusal.detail, record=block.raw(row))
            )

        drafts: Sequence[Draft] = ()
        try:
            drafts = corpus_format.parse_record(block.record(row))
            if not drafts:
                raise Refused("no_messages", "the record holds no conversation")
        except Refused as refusal:
            refuse(refusal)
        for draft in drafts:
            try:
                conversation = canonicalize(draft, rules)
            except Refused as refusal:
                refuse(refusal)
                continue
            own = f"{place.stem}-{number}" if conversation["id"] is None else conversation["id"]
            conversation["id"] = f"{own}/{draft.part}" if draft.part else own
            rows.append({**conversation, "source": source})
            kin.append(draft.kin)
            ignored.update(draft.ignored)
        counts.append(len(rows) - before)
    reading = BlockResult(
        rows=pa.Table.from_pylist(rows, CONVERSATION_SCHEMA),
        kin=pa.array(kin, pa.string()),
        quarantined=quarantined,
        ignored=ignored,
    )
    return reading, counts
