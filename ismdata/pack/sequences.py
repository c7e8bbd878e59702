"""Documents to packed sequences: the columns of a shard's record batch.

Shape legend: R rows (sequences), T = seq_len, D documents, S spans.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.arrays import IntArray, ragged_arange
from ismdata.masks import END, START, TRAIN, block_table, tile, tiled_intervals, tiled_positions, tiled_targets
from ismdata.pack.spool import SpooledDocuments


def build_sequences(
    documents: SpooledDocuments, row_documents: IntArray, schema: pa.Schema, *, seq_len: int, mask: str, pad_id: int
) -> pa.RecordBatch:
    """Lay documents end to end in sequences and compute the columns of a shard.

    Args:
        documents: D documents, in the order of the sequences.
        row_documents: int64[R], documents per sequence.
        schema: The shard's schema, from `packed_schema`.
        seq_len: T, tokens per sequence.
        mask: The mask that targets and block tables are for.
        pad_id: The token after the last document of a sequence.

    Returns:
        R rows.
    """
    rows = len(row_documents)
    row_of_document = np.repeat(np.arange(rows), row_documents)
    before = np.cumsum(documents.lengths) - documents.lengths
    first = np.cumsum(row_documents) - row_documents
    in_row = before - before[first][row_of_document]

    # The documents of a row are already end to end: rows are sliced, not indexed token by token.
    row_tokens = np.add.reduceat(documents.lengths, first)
    ends = np.cumsum(row_tokens)
    padding = np.full(seq_len, pad_id, np.int32)
    input_ids = np.concatenate(
        [
            part
            for end, tokens in zip(ends.tolist(), row_tokens.tolist(), strict=True)
            for part in (documents.input_ids[end - tokens : end], padding[tokens:])
        ]
    )
    spans = documents.spans.copy()
    document_of_span = np.repeat(np.arange(len(documents.lengths)), documents.span_counts)
    spans[:, START : END + 1] += in_row[document_of_span, None].astype(np.int32)
    row_of_span = row_of_document[document_of_span]
    row_spans = np.bincount(row_of_span, minlength=rows)

    tiling = tile(row_documents, documents.lengths, row_spans, spans, seq_len=seq_len)
    doc_start, kv_end = (x.reshape(rows, seq_len) for x in tiled_intervals(tiling, mask=mask))
    # Offsets within the row, computed in place: allocating takes longer than subtracting.
    base = np.arange(0, rows * seq_len, seq_len, dtype=doc_start.dtype)[:, None]
    doc_start -= base
    kv_end -= base
    table = block_table(doc_start, kv_end)
    position_ids = np.subtract(np.arange(seq_len, dtype=doc_start.dtype), doc_start, out=doc_start)
    loss_mask = tiled_targets(tiling, mask=mask)
    columns: dict[str, pa.Array] = {
        "input_ids": _fixed(schema, "input_ids", input_ids),
        "position_ids": _fixed(schema, "position_ids", position_ids),
        "loss_mask": _fixed(schema, "loss_mask", loss_mask),
        "seq_lens": _ragged(schema, "seq_lens", row_documents, pa.array(documents.lengths.astype(np.int32))),
        "spans": _ragged(schema, "spans", row_spans, _span_array(schema, spans)),
        "block_table": _fixed(schema, "block_table", table),
        "conversation_ids": _ragged(schema, "conversation_ids", row_documents, documents.names),
    }
    if "position_ids_2" in schema.names:
        for name, positions in zip(("position_ids", "position_ids_2"), tiled_positions(tiling), strict=True):
            columns[name] = _fixed(schema, name, positions)
    if "loss_weight" in schema.names:
        weights = np.zeros(rows * seq_len, np.float32)
        starts = spans[:, START] + row_of_span * seq_len
        span_lengths = (spans[:, END] - spans[:, START]).astype(np.int64)
        weights[ragged_arange(starts, span_lengths)] = np.repeat(documents.span_weights, span_lengths)
        columns["loss_weight"] = _fixed(schema, "loss_weight", weights * loss_mask)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _fixed(schema: pa.Schema, name: str, values: NDArray[Any]) -> pa.Array:
    """A column of fixed-size lists."""
    type_ = schema.field(name).type
    flat = pa.array(np.ascontiguousarray(values.reshape(-1)), type_.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=type_)


def _ragged(schema: pa.Schema, name: str, counts: IntArray, values: pa.Array) -> pa.Array:
    """A column of lists with `counts` values each."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, values, type=schema.field(name).type)


def _span_array(schema: pa.Schema, spans: NDArray[np.int32]) -> pa.StructArray:
    """Spans, int32[S, 4], as structs."""
    type_ = schema.field("spans").type.value_type
    columns = [pa.array(spans[:, k].astype(bool) if k == TRAIN else spans[:, k], type_.field(k).type) for k in range(4)]
    return pa.StructArray.from_arrays(columns, fields=[type_.field(k) for k in range(4)])
