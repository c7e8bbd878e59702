"""The fast road for records that hold more than their messages, as most published corpora do.

What more they hold becomes `meta`, so that part of each record is taken as Python values. The messages go to columns
without a Python object each, which is where the general road spends its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.convert.canonical import MEDIA, meta_text
from ismdata.convert.columnar import flat_list, mask, per_record
from ismdata.convert.corpus_format import Block, Columns, take_id
from ismdata.convert.sources.blocks import TableBlock, plain_value
from ismdata.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a record holds beside its messages: its id as text and its `meta`."""

    id: str | None
    meta: str | None


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A record of messages that are a role and a text each: `roles` and `contents` go together."""

    roles: Sequence[str]
    contents: Sequence[str]
    rest: Rest
    ignored: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Apart:
    """N rows of a table: their messages alone as a block, the other fields of each, and fields that are left out.

    `ignored` counts them by name, int64[N] each; `care` is bool[N]: rows with message fields for the general road.
    """

    messages: TableBlock
    others: list[dict[str, Any]]
    ignored: dict[str, NDArray[np.int64]]
    care: NDArray[np.bool_]


def rest_of(fields: dict[str, Any], unused: Collection[str]) -> Rest | None:
    """Id and meta of a record without its messages; None where the general road has more to say about it.

    `unused` names fields that must hold nothing. Takes `fields` apart.
    """
    for name in unused:
        if fields.pop(name, None) not in (None, "", []):
            return None
    if any(fields.get(name) for name in MEDIA):
        return None
    own = take_id(fields)
    try:
        return Rest(id=None if own is None else str(own), meta=meta_text(fields))
    except Refused:
        return None


def columns_of_records(block: Block, plain: Callable[[Any], Plain | None]) -> Columns | None:
    """The columns of a block; records that are not plain are left to the general road. None where none is plain."""
    rests: list[Rest | None] = []
    lengths = np.zeros(len(block.numbers), np.int64)
    roles: list[str] = []
    contents: list[str] = []
    ignored: defaultdict[str, list[int]] = defaultdict(list)
    for row in range(len(block.numbers)):
        try:
            found = plain(block.record(row))
        except Refused:
            found = None
        rests.append(None if found is None else found.rest)
        if found is not None:
            lengths[row] = len(found.roles)
            roles += found.roles
            contents += found.contents
            for name in found.ignored:
                ignored[name].append(row)
    care = np.array([rest is None for rest in rests], np.bool_)
    if care.all():
        return None
    try:
        return Columns(
            ids=ids_of(rests),
            offsets=offsets_of(lengths),
            roles=pa.array(roles, pa.string()),
            contents=pa.array(contents, pa.string()),
            care=care,
            meta=meta_of(rests),
            ignored={name: np.bincount(rows, minlength=len(care)) for name, rows in ignored.items()},
        )
    except UnicodeEncodeError:  # half a surrogate pair somewhere: the general road finds out where
        return None


def ids_of(rests: Sequence[Rest | None]) -> pa.Array:
    """string[N]"""
    return pa.array([None if rest is None else rest.id for rest in rests], pa.string())


def meta_of(rests: Sequence[Rest | None]) -> pa.Array:
    """string[N]"""
    return pa.array([None if rest is None else rest.meta for rest in rests], pa.string())


def apart(block: TableBlock, name: str, *, known: Collection[str], heeded: Collection[str]) -> Apart | None:
    """The rows of a table whose column `name` is a list of messages, None where it is none.

    Of the fields of a message the `known` ones stay. Rows in which a `heeded` one of the others holds something need
    care; what the rest of them hold is left out and counted.
    """
    column = block.rows[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None
    kind = column.type.value_type
    if not pa.types.is_struct(kind) or len({field.name for field in kind}) < kind.num_fields:
        return None
    offsets, values = flat_list(column)
    kept = [field for field in kind if field.name in known]
    care = np.zeros(len(block.rows), np.bool_)
    ignored: dict[str, NDArray[np.int64]] = {}
    for field in kind:
        if field.name not in known:
            held = _held(values.field(field.name))
            if field.name in heeded:
                care |= per_record(held, offsets)
            elif held.any():
                total = offsets_of(held.astype(np.int64))
                ignored[f"{name}[].{field.name}"] = total[offsets[1:]] - total[offsets[:-1]]
    if not kept:
        return None
    children = [values.field(field.name) for field in kept]
    messages = pa.StructArray.from_arrays(children, fields=kept, mask=values.is_null())
    listed = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages)
    return Apart(
        messages=TableBlock(rows=pa.table({name: listed}), numbers=block.numbers),
        others=[plain_value(fields) for fields in block.rows.drop_columns([name]).to_pylist()],
        ignored=ignored,
        care=care,
    )


def _held(values: pa.Array) -> NDArray[np.bool_]:
    """Which values are some; numbers that are none count as null, as they do on the general road."""
    if pa.types.is_floating(values.type):
        return mask(pc.fill_null(pc.is_finite(values), False))
    return mask(values.is_valid())
