"""The fast path: a block's columns become canonical rows by `pyarrow.compute` and numpy, without objects per message.

The rules are those of `canonical.py`, applied to whole columns. A row that breaks a rule, or that holds anything but
plain text, is marked `fallback` and parsed again by the general path, which alone can say what is wrong with it. So the
fast path never refuses a record, and its rows equal those of the general path.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.conversation import CONVERSATION_SCHEMA, MESSAGE_TYPE
from ismdata.convert.canonical import JOINED_ROLES, Rules
from ismdata.convert.corpus_format import Columns
from ismdata.convert.training_flags import is_flag

#: All characters that `str.strip` removes, so that "blank" means the same on both paths. The last one is U+3000.
WHITESPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))


def assemble(
    columns: Columns, rules: Rules, *, sources: pa.Array, own_ids: pa.Array
) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Build the canonical rows of a block of N records.

    Args:
        columns: The parsed block.
        rules: The rules that all formats share.
        sources: string[N], the `source` of each record.
        own_ids: string[N], the id of each record that has none itself.

    Returns:
        N rows of CONVERSATION_SCHEMA, and bool[N]: the rows that the general path must parse, whose values here are
        meaningless.
    """
    names = columns.roles.dictionary_encode() if not pa.types.is_dictionary(columns.roles.type) else columns.roles
    canonical = pa.array([rules.roles.get(name.lower()) for name in names.dictionary.to_pylist()], pa.string())
    role = canonical.take(names.indices)
    empty = pc.and_(pc.equal(role, "assistant"), pc.equal(pc.utf8_ltrim(columns.contents, WHITESPACE), ""))
    special = as_bools(role.is_null()) | as_bools(pc.fill_null(empty, False))  # messages for the general path
    if rules.join and len(role) > 1:
        same_role = as_bools(pc.fill_null(pc.equal(role[1:], role[:-1]), False))
        starts = columns.offsets[1:-1]
        same_role[starts[(starts > 0) & (starts < len(role))] - 1] = False  # the message before is another record's
        special[1:] |= same_role & as_bools(pc.fill_null(pc.is_in(role[1:], pa.array(JOINED_ROLES)), False))
    fallback = columns.fallback | any_per_record(special, columns.offsets)
    for name, counts in columns.ignored.items():
        if is_flag(name):  # the general path refuses it
            fallback |= counts > 0

    count = len(columns.contents)
    given = {**columns.optional, "role": pc.fill_null(role, ""), "content": columns.contents}
    children = [given[field.name] if field.name in given else pa.nulls(count, field.type) for field in MESSAGE_TYPE]
    messages = pa.StructArray.from_arrays(children, fields=list(MESSAGE_TYPE))
    message_lists = pa.ListArray.from_arrays(
        pa.array(columns.offsets, pa.int32()), messages, type=CONVERSATION_SCHEMA.field("messages").type
    )
    ids = own_ids
    if columns.ids is not None:
        ids = pc.if_else(pc.fill_null(pc.not_equal(columns.ids, ""), False), columns.ids, own_ids)
    rows = len(fallback)
    meta = pa.nulls(rows, pa.string()) if columns.meta is None else columns.meta
    arrays = [ids, sources, message_lists, pa.nulls(rows, pa.string()), meta]
    return pa.Table.from_arrays(arrays, schema=CONVERSATION_SCHEMA), fallback


def as_bools(values: pa.Array) -> NDArray[np.bool_]:
    """A boolean Arrow array without nulls as bool[N]."""
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.bool_)


def flat_list(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """The offsets int64[N + 1] and the values of a list column of N rows. A null list counts as empty."""
    lists = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return offsets_of(lengths), lists.flatten()


def any_per_record(marked: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether any message of each record is marked: bool[M] over messages to bool[N] over records.

    >>> any_per_record(np.array([False, True, False]), np.array([0, 2, 2, 3])).tolist()
    [True, False, False]
    """
    if not marked.any():
        return np.zeros(len(offsets) - 1, np.bool_)
    total = offsets_of(marked.astype(np.int64))
    return total[offsets[1:]] > total[offsets[:-1]]


def has_text(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which rows of a string column are neither null nor empty, bool[N]."""
    return as_bools(pc.fill_null(pc.not_equal(column, ""), False).combine_chunks())
