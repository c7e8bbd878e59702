"""The fast path for records with more fields than their messages, as in most published corpora.

The other fields become `meta`, so they are parsed to Python values. The messages become columns without a Python object
each; creating those is where the general path spends most of its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.convert.answer_labels import may_be_labelled
from ismdata.convert.canonical import MEDIA_FIELDS, meta_json
from ismdata.convert.columnar import any_per_record, as_bools, flat_list
from ismdata.convert.corpus_format import SYSTEM_LIKE, Block, Columns, take_id
from ismdata.convert.sources.blocks import TableBlock, plain_value
from ismdata.errors import Refused


@dataclass(frozen=True, kw_only=True)
class RecordInfo:
    """A record without its messages: its id as text, and `meta` as JSON text."""

    id: str | None
    meta: str | None


@dataclass(frozen=True, kw_only=True)
class PlainRecord:
    """A record whose messages are only a role and a text each.

    `roles` and `contents` have one entry per message; `ignored` names message fields that are dropped.
    """

    roles: Sequence[str]
    contents: Sequence[str]
    info: RecordInfo
    ignored: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class MessageTable:
    """N rows of a table, split into messages and other fields.

    Attributes:
        messages: The column of messages as a block.
        others: The other fields of each row.
        ignored: By name, how many message fields of each row are dropped, int64[N] each.
        fallback: bool[N], the rows with message fields that only the general path can parse.
    """

    messages: TableBlock
    others: list[dict[str, Any]]
    ignored: dict[str, NDArray[np.int64]]
    fallback: NDArray[np.bool_]


def record_info(fields: dict[str, Any], unused: Collection[str]) -> RecordInfo | None:
    """Id and meta of a record, given its fields without the messages; None if the general path must parse the record.

    Removes entries from `fields`. `unused` names fields that must be empty.
    """
    for name in unused:
        if fields.pop(name, None) not in (None, "", []):
            return None
    if any(fields.get(name) for name in MEDIA_FIELDS) or _is_special(tuple(fields)):
        return None
    own = take_id(fields)
    try:
        return RecordInfo(id=None if own is None else str(own), meta=meta_json(fields))
    except Refused:
        return None


@lru_cache(maxsize=1024)
def _is_special(names: tuple[Any, ...]) -> bool:
    """Whether a record with these fields can have a label or a system prompt under a less usual name."""
    return may_be_labelled(names) or not SYSTEM_LIKE.isdisjoint(names)


def columns_of_records(block: Block, plain: Callable[[Any], PlainRecord | None]) -> Columns | None:
    """Columns of a block by parsing each record with `plain`, which returns None for records of the general path.

    Returns None if no record is plain, or if a text is not valid Unicode.
    """
    infos: list[RecordInfo | None] = []
    lengths = np.zeros(len(block.numbers), np.int64)
    roles: list[str] = []
    contents: list[str] = []
    ignored: defaultdict[str, list[int]] = defaultdict(list)
    for row in range(len(block.numbers)):
        try:
            found = plain(block.record(row))
        except Refused:
            found = None
        infos.append(None if found is None else found.info)
        if found is not None:
            lengths[row] = len(found.roles)
            roles += found.roles
            contents += found.contents
            for name in found.ignored:
                ignored[name].append(row)
    fallback = np.array([info is None for info in infos], np.bool_)
    if fallback.all():
        return None
    try:
        return Columns(
            ids=id_column(infos),
            offsets=offsets_of(lengths),
            roles=pa.array(roles, pa.string()),
            contents=pa.array(contents, pa.string()),
            fallback=fallback,
            meta=meta_column(infos),
            ignored={name: np.bincount(rows, minlength=len(fallback)) for name, rows in ignored.items()},
        )
    except UnicodeEncodeError:  # half a surrogate pair: the general path finds out in which record
        return None


def id_column(infos: Sequence[RecordInfo | None]) -> pa.Array:
    """The ids of N records, string[N]."""
    return pa.array([None if info is None else info.id for info in infos], pa.string())


def meta_column(infos: Sequence[RecordInfo | None]) -> pa.Array:
    """The meta of N records, string[N]."""
    return pa.array([None if info is None else info.meta for info in infos], pa.string())


def split_table(
    block: TableBlock, name: str, *, known: Collection[str], significant: Collection[str]
) -> MessageTable | None:
    """Split the rows of a table into their messages and the other fields.

    Args:
        block: The table.
        name: The column of messages.
        known: The message fields to keep.
        significant: Message fields that only the general path can parse: rows with a value there are `fallback`. All
            other message fields are dropped and counted.

    Returns:
        The split table, or None if the column is not a list of objects with distinct, partly known field names.
    """
    column = block.rows[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None
    message_type = column.type.value_type
    if not pa.types.is_struct(message_type) or len({field.name for field in message_type}) < message_type.num_fields:
        return None
    offsets, values = flat_list(column)
    kept = [field for field in message_type if field.name in known]
    fallback = np.zeros(len(block.rows), np.bool_)
    ignored: dict[str, NDArray[np.int64]] = {}
    for field in message_type:
        if field.name not in known:
            present = _is_present(values.field(field.name))
            if field.name in significant:
                fallback |= any_per_record(present, offsets)
            elif present.any():
                total = offsets_of(present.astype(np.int64))
                ignored[f"{name}[].{field.name}"] = total[offsets[1:]] - total[offsets[:-1]]
    if not kept:
        return None
    children = [values.field(field.name) for field in kept]
    messages = pa.StructArray.from_arrays(children, fields=kept, mask=values.is_null())
    message_lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
    return MessageTable(
        messages=TableBlock(rows=pa.table({name: message_lists}), numbers=block.numbers),
        others=[plain_value(fields) for fields in block.rows.drop_columns([name]).to_pylist()],
        ignored=ignored,
        fallback=fallback,
    )


def _is_present(values: pa.Array) -> NDArray[np.bool_]:
    """Which values are not null, bool[M]. NaN and infinity count as null, as on the general path."""
    if pa.types.is_floating(values.type):
        return as_bools(pc.fill_null(pc.is_finite(values), False))
    return as_bools(values.is_valid())
