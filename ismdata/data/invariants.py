"""The invariants of packed rows, checked for many rows at a time.

- Spans tile documents. position_ids, loss_mask and block_table follow from them; they are computed again and compared.
- Token ids are in the vocabulary, padding has the pad id, and loss weights are on targets only.
- No token sees the target that it predicts.

Each problem names the row and the token, what was found and what was expected.

Shape legend: R rows (sequences) checked together, T = seq_len, D documents, S spans, B = block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import ragged_arange
from ismdata.data import shards
from ismdata.data.problems import Problems
from ismdata.errors import DataError
from ismdata.masks import (
    BLOCK_SIZE,
    Tiling,
    answer_runs,
    block_table,
    tile,
    tiled_intervals,
    tiled_positions,
    tiled_targets,
)

#: The totals of an index that are sums over rows.
ROW_TOTALS = ("documents", "sequences", "tokens", "target_tokens", "padding_tokens")


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """What a packed folder's index says about each of its rows."""

    seq_len: int
    mask: str
    weighted: bool
    vocab_size: int
    pad_id: int
    schema: pa.Schema
    glm: tuple[int, int] | None = None  # ids of [MASK] and [START] in the GLM layout


@dataclass(frozen=True, kw_only=True)
class Rows:
    """R rows of a shard as flat arrays; `first` is the number of the first row in its shard."""

    first: int
    input_ids: NDArray[np.int32]  # [R * T]
    position_ids: NDArray[np.int32]  # [R * T]
    loss_mask: NDArray[np.uint8]  # [R * T]
    row_documents: NDArray[np.int64]  # [R]
    seq_lens: NDArray[np.int32]  # [D]
    row_spans: NDArray[np.int64]  # [R]
    spans: NDArray[np.int32]  # [S, 4]
    block_table: NDArray[np.int16]  # [R, T / B, 4]
    row_ids: NDArray[np.int64]  # [R] conversation ids per row
    loss_weight: NDArray[np.float32] | None  # [R * T]
    position_ids_2: NDArray[np.int32] | None  # [R * T]

    @classmethod
    def of(cls, batch: pa.RecordBatch, first: int, row_format: RowFormat) -> Rows:
        """The rows of a record batch, without copying where Arrow allows it."""

        def flat(name: str) -> NDArray[Any]:
            values: NDArray[Any] = batch.column(name).flatten().to_numpy()
            return values

        def per_row(name: str) -> NDArray[np.int64]:
            lengths: NDArray[np.int64] = pc.list_value_length(batch.column(name)).to_numpy().astype(np.int64)
            return lengths

        return cls(
            first=first,
            input_ids=flat("input_ids"),
            position_ids=flat("position_ids"),
            loss_mask=flat("loss_mask"),
            row_documents=per_row("seq_lens"),
            seq_lens=flat("seq_lens"),
            row_spans=per_row("spans"),
            spans=shards.span_matrix(batch.column("spans").flatten()),
            block_table=flat("block_table").reshape(batch.num_rows, -1, 4),
            row_ids=per_row("conversation_ids"),
            loss_weight=flat("loss_weight") if row_format.weighted else None,
            position_ids_2=flat("position_ids_2") if row_format.glm else None,
        )

    def __len__(self) -> int:
        return len(self.row_documents)

    def halves(self, row_format: RowFormat) -> Iterator[Rows]:
        """Yield the first and the second half of the rows."""
        middle = len(self) // 2
        for start, stop in ((0, middle), (middle, len(self))):
            tokens = slice(start * row_format.seq_len, stop * row_format.seq_len)
            documents = slice(int(self.row_documents[:start].sum()), int(self.row_documents[:stop].sum()))
            spans = slice(int(self.row_spans[:start].sum()), int(self.row_spans[:stop].sum()))
            yield Rows(
                first=self.first + start,
                input_ids=self.input_ids[tokens],
                position_ids=self.position_ids[tokens],
                loss_mask=self.loss_mask[tokens],
                row_documents=self.row_documents[start:stop],
                seq_lens=self.seq_lens[documents],
                row_spans=self.row_spans[start:stop],
                spans=self.spans[spans],
                block_table=self.block_table[start:stop],
                row_ids=self.row_ids[start:stop],
                loss_weight=None if self.loss_weight is None else self.loss_weight[tokens],
                position_ids_2=None if self.position_ids_2 is None else self.position_ids_2[tokens],
            )

    def totals(self, row_format: RowFormat) -> dict[str, int]:
        """ROW_TOTALS of these rows."""
        tokens = int(self.seq_lens.sum(dtype=np.int64))
        return {
            "documents": len(self.seq_lens),
            "sequences": len(self),
            "tokens": tokens,
            "target_tokens": int(np.count_nonzero(self.loss_mask)),
            "padding_tokens": len(self) * row_format.seq_len - tokens,
        }


def check_rows(path: Path, rows: Rows, row_format: RowFormat, problems: Problems) -> None:
    """Add a problem for each invariant that rows violate.

    If spans do not tile their documents, the rows are halved until the faulty ones are found; only these are left
    unchecked.
    """
    try:
        tiling = tile(
            rows.row_documents,
            rows.seq_lens,
            rows.row_spans,
            rows.spans,
            seq_len=row_format.seq_len,
            first_row=rows.first,
        )
    except DataError as error:
        if len(rows) == 1:
            problems.add_rows(path, "spans", str(error), 1)
        else:
            for half in rows.halves(row_format):
                check_rows(path, half, row_format, problems)
        return

    def report(kind: str, bad: NDArray[np.bool_], found: Callable[[int], str]) -> None:
        """Add a problem if any token is bad, bool[R * T]; `found` describes the token at an offset."""
        at = np.flatnonzero(bad)
        if len(at):
            row, token = divmod(int(at[0]), row_format.seq_len)
            sentence = f"row {rows.first + row}, token {token}: {found(int(at[0]))}"
            problems.add_rows(path, kind, sentence, len(np.unique(at // row_format.seq_len)))

    doc_start, kv_end = tiled_intervals(tiling, mask=row_format.mask)
    _check_ids(rows, tiling, row_format, report)
    _check_targets(rows, tiling, kv_end, row_format, report)
    if row_format.glm is None:
        position = np.arange(len(doc_start), dtype=doc_start.dtype)
        position -= doc_start
        _check_positions("position_ids", rows.position_ids, position, report)
    else:
        _check_glm(rows, tiling, row_format.glm, report)
    _check_block_table(path, rows, doc_start, kv_end, problems)
    odd = np.flatnonzero(rows.row_ids != rows.row_documents)
    if len(odd):
        row = int(odd[0])
        sentence = f"row {rows.first + row}: {rows.row_ids[row]} conversation_ids; expected {rows.row_documents[row]}, "
        problems.add_rows(path, "conversation_ids", sentence + "one per document", len(odd))
    empty = np.flatnonzero(rows.row_documents == 0)
    if len(empty):
        problems.add_rows(path, "empty", f"row {rows.first + empty[0]}: no document; expected at least one", len(empty))


_Report = Callable[[str, NDArray[np.bool_], Callable[[int], str]], None]


def _check_positions(name: str, found: NDArray[Any], expected: NDArray[Any], report: _Report) -> None:
    if not np.array_equal(found, expected):
        report(name, found != expected, lambda at: f"{name} is {found[at]}; expected {expected[at]}")


def _check_block_table(
    path: Path, rows: Rows, doc_start: NDArray[Any], kv_end: NDArray[Any], problems: Problems
) -> None:
    """Check the block tables against the intervals of the R rows laid end to end, [R * T]."""
    shape = (len(rows), -1)
    expected = block_table(doc_start.reshape(shape), kv_end.reshape(shape))
    # Offsets count from the first of the R rows, those of a table from its own row. int16 wraps around, and so does the
    # subtraction, which makes the result right.
    expected -= (np.arange(len(rows)) * rows.block_table.shape[1]).astype(np.int16)[:, None, None]
    if not np.array_equal(rows.block_table, expected):
        at = np.argwhere(rows.block_table != expected)
        row, block, column = at[0].tolist()
        name = ("visible_lo", "visible_hi", "full_lo", "full_hi")[column]
        sentence = (
            f"row {rows.first + row}, token {block * BLOCK_SIZE}: block_table {name} of block row {block} is "
            f"{rows.block_table[row, block, column]}; expected {expected[row, block, column]}"
        )
        problems.add_rows(path, "block_table", sentence, len(np.unique(at[:, 0])))


def _check_glm(rows: Rows, tiling: Tiling, tokens: tuple[int, int], report: _Report) -> None:
    """Check both positions, and that each answer follows `[MASK]` and starts with `[START]` as an untrained span."""
    first, second = tiled_positions(tiling)
    _check_positions("position_ids", rows.position_ids, first, report)
    assert rows.position_ids_2 is not None
    _check_positions("position_ids_2", rows.position_ids_2, second, report)
    mask_id, start_id = tokens
    opened = answer_runs(tiling)
    start = tiling.start[opened]
    ids = rows.input_ids
    bad = np.zeros(len(ids), bool)
    bad[start] = (
        (start == tiling.document_start[opened])
        | (ids[start - 1] != mask_id)
        | (ids[start] != start_id)
        | (tiling.length[opened] != 1)
        | (tiling.train[opened] != 0)
    )
    report(
        "glm_tokens",
        bad,
        lambda at: (
            f"an answer starts with token {ids[at]} after token {ids[at - 1]}; expected [START] ({start_id}) as an "
            f"untrained span of one token, after [MASK] ({mask_id})"
        ),
    )


def _check_ids(rows: Rows, tiling: Tiling, row_format: RowFormat, report: _Report) -> None:
    """Check that token ids are in the vocabulary, and that padding has the pad id."""
    ids = rows.input_ids
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= row_format.vocab_size):
        report(
            "input_ids",
            (ids < 0) | (ids >= row_format.vocab_size),
            lambda at: f"input_ids is {ids[at]}; expected 0 to {row_format.vocab_size - 1}",
        )
    padding = tiling.kind < 0
    if padding.any():
        tokens = ragged_arange(tiling.start[padding], tiling.length[padding])
        wrong = np.zeros(len(ids), bool)
        wrong[tokens] = ids[tokens] != row_format.pad_id
        report(
            "padding", wrong, lambda at: f"input_ids is {ids[at]} on padding; expected the pad id {row_format.pad_id}"
        )


def _check_targets(rows: Rows, tiling: Tiling, kv_end: NDArray[Any], row_format: RowFormat, report: _Report) -> None:
    """Check that targets are those of the mask, that no token sees the target it predicts, and the loss weights."""
    loss_mask, seq_len = rows.loss_mask, row_format.seq_len
    expected = tiled_targets(tiling, mask=row_format.mask)
    if not np.array_equal(loss_mask, expected):
        report(
            "loss_mask",
            loss_mask != expected,
            lambda at: f"loss_mask is {loss_mask[at]}; expected {expected[at]} under the {row_format.mask} mask",
        )
    target = np.flatnonzero(loss_mask)
    leaking = target[kv_end[target - 1] > target] if len(target) else target
    if len(leaking):
        leaks = np.zeros(len(loss_mask), bool)
        leaks[leaking] = True
        report(
            "leak",
            leaks,
            lambda at: (
                f"a target that token {at % seq_len - 1} predicts and sees: its kv_end is "
                f"{kv_end[at - 1] - at // seq_len * seq_len}; expected at most {at % seq_len}"
            ),
        )
    weight = rows.loss_weight
    if weight is not None:
        report(
            "loss_weight",
            ~np.isfinite(weight) | (weight < 0) | ((weight != 0) & (loss_mask == 0)),
            lambda at: (
                f"loss_weight is {weight[at]}; expected a finite number of at least 0 on targets, and 0 elsewhere"
            ),
        )
