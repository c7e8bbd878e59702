"""The fast road: a block's columns become canonical rows by `pyarrow.compute` and numpy, no Python object a message.

The rules are those of `canonical.py`, asked of whole columns: a row that breaks one, or that holds anything but plain
text, is marked as needing care and left to that file.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.conversation import CONVERSATION_SCHEMA, MESSAGE_TYPE
from ismdata.convert.canonical import JOINED, Rules
from ismdata.convert.corpus_format import Columns
from ismdata.convert.training_flags import is_flag

#: All characters that `str.strip` takes away: the one definition of "blank" for both roads.
BLANKS = "".join(filter(str.isspace, map(chr, range(0x110000))))


def assemble(
    columns: Columns, rules: Rules, *, sources: pa.Array, own_ids: pa.Array
) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Canonical rows of a block of N records, and bool[N]: which rows need care and hold nothing to be used.

    `sources` and `own_ids` are string[N]: where each record stands and what to call it when it has no id.
    """
    names = columns.roles.dictionary_encode() if not pa.types.is_dictionary(columns.roles.type) else columns.roles
    mapped = pa.array([rules.roles.get(name.lower()) for name in names.dictionary.to_pylist()], pa.string())
    role = mapped.take(names.indices)
    empty = pc.and_(pc.equal(role, "assistant"), pc.equal(pc.utf8_ltrim(columns.contents, BLANKS), ""))
    odd = mask(role.is_null()) | mask(pc.fill_null(empty, False))
    if rules.join and len(role) > 1:
        again = mask(pc.fill_null(pc.equal(role[1:], role[:-1]), False))
        again[columns.offsets[1:-1][(columns.offsets[1:-1] > 0) & (columns.offsets[1:-1] < len(role))] - 1] = False
        odd[1:] |= again & mask(pc.fill_null(pc.is_in(role[1:], pa.array(JOINED)), False))
    care = columns.care | per_record(odd, columns.offsets)
    for name, counts in columns.ignored.items():
        if is_flag(name):  # refused, on the general road
            care |= counts > 0

    count = len(columns.contents)
    given = {**columns.optional, "role": pc.fill_null(role, ""), "content": columns.contents}
    children = [given[field.name] if field.name in given else pa.nulls(count, field.type) for field in MESSAGE_TYPE]
    messages = pa.StructArray.from_arrays(children, fields=list(MESSAGE_TYPE))
    listed = pa.ListArray.from_arrays(
        pa.array(columns.offsets, pa.int32()), messages, type=CONVERSATION_SCHEMA.field("messages").type
    )
    ids = own_ids
    if columns.ids is not None:
        ids = pc.if_else(pc.fill_null(pc.not_equal(columns.ids, ""), False), columns.ids, own_ids)
    rows = len(care)
    meta = pa.nulls(rows, pa.string()) if columns.meta is None else columns.meta
    arrays = [ids, sources, listed, pa.nulls(rows, pa.string()), meta]
    return pa.Table.from_arrays(arrays, schema=CONVERSATION_SCHEMA), care


def mask(values: pa.Array) -> NDArray[np.bool_]:
    """A boolean Arrow array without nulls as bool[N]."""
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.bool_)


def flat_list(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """A list column of N rows as offsets int64[N + 1] and its values; null counts as empty."""
    lists = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return offsets_of(lengths), lists.flatten()


def per_record(odd: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool[M] over messages to bool[N] over records: is any of a record's messages marked?

    >>> per_record(np.array([False, True, False]), np.array([0, 2, 2, 3])).tolist()
    [True, False, False]
    """
    if not odd.any():
        return np.zeros(len(offsets) - 1, np.bool_)
    total = offsets_of(odd.astype(np.int64))
    return total[offsets[1:]] > total[offsets[:-1]]


def held(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which rows of a string column hold text, bool[N]."""
    return mask(pc.fill_null(pc.not_equal(column, ""), False).combine_chunks())
