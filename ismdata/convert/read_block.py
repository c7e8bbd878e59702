"""Read one block: records become canonical rows or quarantine entries.

The fast path (`columnar.py`) reads the whole block at once. Rows that it leaves, or all rows of a block or format
without a fast path, take the general path (`canonical.py`), one record at a time.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.conversation import CONVERSATION_SCHEMA, Quarantined
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.columnar import as_bools, assemble
from ismdata.convert.corpus_format import Block, Draft, SourceBlock
from ismdata.convert.sources.blocks import ConversationBlock, LineBlock
from ismdata.errors import Refused


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The conversations of a block: each is either a row or quarantined.

    Attributes:
        rows: N rows of CONVERSATION_SCHEMA, in the order of the records.
        split_groups: string[N], each row's `Draft.split_group`.
        quarantined: The refused records and conversations, in the order of the records.
        ignored: How many message fields were dropped, by name.
        checksum: `block_checksum` of the block.
        split: The split that the records belong to, None if nothing names one.
    """

    rows: pa.Table
    split_groups: pa.Array
    quarantined: list[Quarantined]
    ignored: Counter[str] = field(default_factory=Counter)
    checksum: int = 0
    split: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return int(self.rows.nbytes)


def read_block(block: SourceBlock, rules: Rules) -> BlockResult:
    """Read a block on the fast path, and what that leaves on the general path.

    Args:
        block: The records, with their format.
        rules: The rules that all formats share.

    Returns:
        The same rows and quarantine entries as `read_records`, and the block's checksum.
    """
    if isinstance(block.records, ConversationBlock):
        return _converted(block.records, block.place.split)
    checksum, split = block_checksum(block.records), block.place.split
    columns = block.corpus_format.parse_block(block.records)
    if columns is None:
        return replace(read_records(block, rules), checksum=checksum, split=split)
    numbers = pa.array(block.records.numbers).cast(pa.string())
    sources = pc.binary_join_element_wise(block.place.prefix, numbers, "")
    own_ids = pc.binary_join_element_wise(f"{block.place.stem}-", numbers, "")
    rows, fallback = assemble(columns, rules, sources=sources, own_ids=own_ids)
    ignored = +Counter({name: int(counts[~fallback].sum()) for name, counts in columns.ignored.items()})
    groups = pa.nulls(len(rows), pa.string())
    if not fallback.any():
        return BlockResult(
            rows=rows, split_groups=groups, quarantined=[], ignored=ignored, checksum=checksum, split=split
        )
    chosen = np.flatnonzero(fallback).tolist()
    general, counts = _read_chosen(block, rules, chosen)
    merged = _merge(
        rows.append_column("group", groups), general.rows.append_column("group", general.split_groups), chosen, counts
    )
    return BlockResult(
        rows=merged.drop_columns("group"),
        split_groups=merged["group"].combine_chunks(),
        quarantined=general.quarantined,
        ignored=ignored + general.ignored,
        checksum=checksum,
        split=split,
    )


def _converted(block: ConversationBlock, split: str | None) -> BlockResult:
    """The rows as they are. Rows of one record are adjacent and keep together, as the paths of a tree do."""
    sources = block.rows["source"].combine_chunks()
    same = np.zeros(len(sources) + 1, np.bool_)
    same[1:-1] = as_bools(pc.equal(sources[1:], sources[:-1]))
    groups = pc.if_else(pa.array(same[1:] | same[:-1]), sources, None)
    return BlockResult(rows=block.rows, split_groups=groups, quarantined=[], split=split)


def read_records(block: SourceBlock, rules: Rules) -> BlockResult:
    """Read all records of a block on the general path."""
    return _read_chosen(block, rules, range(len(block.records.numbers)))[0]


def block_checksum(block: Block) -> int:
    """CRC-32 of a block's text; 0 for other blocks, whose files are identified by size and time alone."""
    return zlib.crc32(block.data) if isinstance(block, LineBlock) else 0


def _merge(rows: pa.Table, general: pa.Table, chosen: Sequence[int], counts: Sequence[int]) -> pa.Table:
    """Replace the row at `chosen[i]` by the next `counts[i]` rows of `general`."""
    pieces, done, taken = [], 0, 0
    for at, count in zip(chosen, counts, strict=True):
        pieces += [rows.slice(done, at - done), general.slice(taken, count)]
        taken += count
        done = at + 1
    return pa.concat_tables([*pieces, rows.slice(done)]).combine_chunks()


def _read_chosen(block: SourceBlock, rules: Rules, chosen: Sequence[int]) -> tuple[BlockResult, list[int]]:
    """Read the records at `chosen` on the general path; also return how many rows each one gave."""
    records, place, corpus_format = block
    rows: list[dict[str, Any]] = []
    groups: list[str | None] = []
    quarantined: list[Quarantined] = []
    ignored: Counter[str] = Counter()
    counts = []
    for row in chosen:
        number, before = records.numbers[row], len(rows)
        source = f"{place.prefix}{number}"

        def refuse(refusal: Refused, row: int = row, source: str = source) -> None:
            quarantined.append(
                Quarantined(source=source, reason=refusal.reason, detail=refusal.detail, record=records.raw(row))
            )

        drafts: Sequence[Draft] = ()
        try:
            drafts = corpus_format.parse_record(records.record(row))
            if not drafts:
                raise Refused("no_messages", "the record holds no conversation")
        except Refused as refusal:
            refuse(refusal)
        for draft in drafts:
            left_out = list(draft.ignored)
            try:
                conversation = canonicalize(draft, rules, left_out)
            except Refused as refusal:
                refuse(refusal)
                continue
            own_id = f"{place.stem}-{number}" if conversation["id"] is None else conversation["id"]
            conversation["id"] = f"{own_id}/{draft.id_suffix}" if draft.id_suffix else own_id
            rows.append({**conversation, "source": source})
            groups.append(draft.split_group)
            ignored.update(left_out)
        counts.append(len(rows) - before)
    result = BlockResult(
        rows=pa.Table.from_pylist(rows, CONVERSATION_SCHEMA),
        split_groups=pa.array(groups, pa.string()),
        quarantined=quarantined,
        ignored=ignored,
    )
    return result, counts
