"""Spans to attention intervals, targets and block tables (docs/masks.md). numpy only.

Row `t` of a sequence sees the keys `[doc_start[t], kv_end[t])`. The three masks differ in `kv_end` alone:

- `causal`: `t + 1`
- `ism`: the end of t's context block if t is in one, otherwise `t + 1` (f(j) in Equation 5 of the ISM paper)
- `prefix`: the start of the document's last answer for every t before it, otherwise `t + 1`; in a document without
  answers every token sees all of the document

A context block is a maximal run of spans that are not answers. Padding sees only itself, so no row of a mask is empty.

>>> spans = [(0, 2, PROMPT, 0), (2, 5, QUERY, 0), (5, 7, ANSWER, 1), (7, 9, QUERY, 0), (9, 12, ANSWER, 1)]
>>> intervals([12], spans, seq_len=12, mask="ism")[1].tolist()
[5, 5, 5, 5, 5, 6, 7, 9, 9, 10, 11, 12]
>>> targets([12], spans, seq_len=12, mask="ism").tolist()
[0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1]

Shape legend: D documents, S spans, R rows (sequences), T = seq_len, B = block_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.choices import check_mask
from ismdata.errors import DataError, UsageError

#: Span kinds as stored in shards.
PROMPT, QUERY, ANSWER = 0, 1, 2

#: Columns of a table of spans, int[S, 4].
START, END, KIND, TRAIN = 0, 1, 2, 3

#: The label of a token that is no target. PyTorch's losses ignore it.
IGNORE_INDEX = -100

#: The block size of the stored block tables. Sequence lengths are multiples of it.
BLOCK_SIZE = 128

IntArray = NDArray[np.int64]
OffsetArray = NDArray[np.signedinteger[Any]]


class Tiling(NamedTuple):
    """The spans and the padding of R rows, in order. All arrays are int64[N], N = spans + rows with padding.

    Attributes:
        start: Offset of the first token, in the R rows laid end to end.
        length: Tokens.
        kind: PROMPT, QUERY or ANSWER; -1 for padding.
        train: Whether an answer is trained; 0 for padding.
        document: Number of the document among those of all rows; -1 for padding.
        document_start: Offset of the document's first token; for padding its own `start`.
    """

    start: IntArray
    length: IntArray
    kind: IntArray
    train: IntArray
    document: IntArray
    document_start: IntArray


def tile(
    row_documents: ArrayLike,
    seq_lens: ArrayLike,
    row_spans: ArrayLike,
    spans: ArrayLike,
    *,
    seq_len: int,
    first_row: int = 0,
) -> Tiling:
    """Lay R rows end to end and cut them at every span border.

    Args:
        row_documents: int[R], documents per row.
        seq_lens: int[D], lengths of the documents, in order.
        row_spans: int[R], spans per row.
        spans: int[S, 4] of start, end, kind, train; offsets count from the beginning of the row.
        seq_len: Tokens per row.
        first_row: Number of the first row, for errors.

    Returns:
        Every span and every padding, in order.

    Raises:
        DataError: If the spans do not tile the documents. The message names the row.
    """
    row_documents = np.asarray(row_documents, np.int64)
    row_spans = np.asarray(row_spans, np.int64)
    lens = np.asarray(seq_lens, np.int64)
    table = np.asarray(spans, np.int64).reshape(-1, 4)
    rows = len(row_documents)
    row_of_document = np.repeat(np.arange(rows), row_documents)
    row_of_span = np.repeat(np.arange(rows), row_spans)
    used = np.bincount(row_of_document, weights=lens, minlength=rows).astype(np.int64)
    if (lens <= 0).any():
        at = int(np.flatnonzero(lens <= 0)[0])
        raise DataError(f"row {first_row + row_of_document[at]}: a document has length {lens[at]}; expected at least 1")
    if (used > seq_len).any():
        row = int(np.flatnonzero(used > seq_len)[0])
        raise DataError(
            f"row {first_row + row}: documents fill {used[row]} tokens; expected at most {seq_len} (seq_len)"
        )
    # Documents of a row are laid end to end from the row's start.
    first = np.cumsum(row_documents) - row_documents
    before = np.cumsum(lens) - lens
    row_base = before[np.minimum(first, max(len(lens) - 1, 0))] if len(lens) else np.zeros(rows, np.int64)
    document_start = before - row_base[row_of_document] + row_of_document * seq_len

    start = table[:, START] + row_of_span * seq_len
    end = table[:, END] + row_of_span * seq_len
    _check_tiling(start, end, row_of_span, document_start, document_start + lens, seq_len, first_row)
    bad = (table[:, KIND] < PROMPT) | (table[:, KIND] > ANSWER)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"row {first_row + row_of_span[at]}: the span at token {table[at, START]} has kind {table[at, KIND]}; "
            f"expected {PROMPT} (prompt), {QUERY} (query) or {ANSWER} (answer)"
        )
    document = np.searchsorted(document_start, start, side="right") - 1

    pad_rows = np.flatnonzero(used < seq_len)
    pad_start = pad_rows * seq_len + used[pad_rows]
    order = np.argsort(np.concatenate([start, pad_start]), kind="stable")

    def merge(of_spans: IntArray, of_pads: IntArray | int) -> IntArray:
        merged = np.empty(len(order), np.int64)
        merged[: len(of_spans)], merged[len(of_spans) :] = of_spans, of_pads
        return merged[order]

    return Tiling(
        start=merge(start, pad_start),
        length=merge(end - start, seq_len - used[pad_rows]),
        kind=merge(table[:, KIND], -1),
        train=merge(table[:, TRAIN], 0),
        document=merge(document, -1),
        document_start=merge(document_start[document] if len(document) else document, pad_start),
    )


def _check_tiling(
    start: IntArray,
    end: IntArray,
    row: IntArray,
    doc_start: IntArray,
    doc_end: IntArray,
    seq_len: int,
    first_row: int,
) -> None:
    """Raise DataError unless spans are non-empty, in order, inside their row, and tile each document."""
    place = None
    outside = (start < row * seq_len) | (end > (row + 1) * seq_len)
    if len(start) == 0:
        if len(doc_start):
            place = (int(doc_start[0]), "no span")
    elif outside.any():
        at = int(np.flatnonzero(outside)[0])
        low, high = int(start[at] - row[at] * seq_len), int(end[at] - row[at] * seq_len)
        raise DataError(
            f"row {first_row + row[at]}: a span of tokens {low} to {high}; expected 0 to {seq_len} (seq_len)"
        )
    elif (end <= start).any():
        at = int(np.flatnonzero(end <= start)[0])
        place = (int(start[at]), "an empty or reversed span")
    elif (start[1:] < end[:-1]).any():
        at = int(np.flatnonzero(start[1:] < end[:-1])[0]) + 1
        place = (int(start[at]), "spans that overlap or are out of order")
    else:
        borders = _is_among(start, doc_start)
        joined = np.concatenate([[True], start[1:] == end[:-1]])
        loose = ~(borders | joined)
        closing = _is_among(end, doc_end)
        follows = np.concatenate([borders[1:], [True]])
        if loose.any():
            place = (int(start[np.flatnonzero(loose)[0]]), "a gap between spans")
        elif int(borders.sum()) != len(doc_start) or not np.array_equal(closing, follows):
            odd = np.flatnonzero(closing != follows)
            at = int(end[odd[0]]) - 1 if len(odd) else int(np.setdiff1d(doc_start, start)[0])
            place = (at, "a span that crosses a document border, or a document without spans")
    if place is not None:
        offset, what = place
        raise DataError(
            f"row {first_row + offset // seq_len}: {what} at token {offset % seq_len}; "
            "expected spans that tile each document"
        )


def _is_among(values: IntArray, ascending: IntArray) -> NDArray[np.bool_]:
    """np.isin for a sorted array. It is faster for a DataLoader's batch, which has some hundred spans."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[at] == values
    return found


def tiled_intervals(tiling: Tiling, *, mask: str) -> tuple[OffsetArray, OffsetArray]:
    """The keys that each token of R rows sees.

    Args:
        tiling: The spans of the rows.
        mask: `ism`, `causal` or `prefix`.

    Returns:
        doc_start, kv_end: [R * T] each, counted over the rows laid end to end (subtract `row * T` for offsets in the
        row). int32, which halves the memory traffic; int64 if R * T does not fit.

    Raises:
        UsageError: If the mask is unknown.
    """
    check_mask(mask)
    tokens = int(tiling.length.sum())
    dtype = np.int32 if tokens <= np.iinfo(np.int32).max else np.int64
    position = np.arange(tokens, dtype=dtype)
    doc_start: OffsetArray = np.repeat(tiling.document_start.astype(dtype), tiling.length)
    padding = tiling.kind < 0
    if padding.any():
        is_padding = np.repeat(padding, tiling.length)
        doc_start[is_padding] = position[is_padding]
    if mask == "causal":
        return doc_start, position + 1
    end = tiling.start + tiling.length
    if mask == "ism":
        context = (tiling.kind == PROMPT) | (tiling.kind == QUERY)
        continues = np.zeros(len(end), bool)
        continues[:-1] = context[1:] & (tiling.document[1:] == tiling.document[:-1])
        block_end = np.where(context & ~continues, end, tokens)
        block_end = np.minimum.accumulate(block_end[::-1])[::-1]
        open_end = np.where(context, block_end, 0)
    else:
        open_end = _last_answer_start(tiling)
        open_end = np.where(tiling.start < open_end, open_end, 0)
    kv_end: OffsetArray = np.repeat(open_end.astype(dtype), tiling.length)
    position += 1
    return doc_start, np.maximum(kv_end, position, out=kv_end)


def _last_answer_start(tiling: Tiling) -> IntArray:
    """For every span, where its document's last answer starts: the document's end if it has none, 0 for padding."""
    documents = int(tiling.document.max(initial=-1)) + 1
    last = np.zeros(documents + 1, np.int64)  # the extra entry is for padding, document -1
    np.maximum.at(last, tiling.document, np.where(tiling.document < 0, 0, tiling.start + tiling.length))
    answers = tiling.kind == ANSWER
    last[tiling.document[answers]] = tiling.start[answers]  # spans are in order, so the last one remains
    return last[tiling.document]


def tiled_targets(tiling: Tiling, *, mask: str) -> NDArray[np.uint8]:
    """Which tokens of R rows are trained.

    Args:
        tiling: The spans of the rows.
        mask: `ism`, `causal` or `prefix`.

    Returns:
        uint8[R * T], 1 for targets.

    Raises:
        UsageError: If the mask is unknown.
    """
    check_mask(mask)
    trained = (tiling.kind == ANSWER) & (tiling.train != 0)
    if mask == "prefix":
        trained &= tiling.start == _last_answer_start(tiling)
    loss_mask = np.repeat(trained.astype(np.uint8), tiling.length)
    loss_mask[tiling.document_start[tiling.document >= 0]] = 0
    return loss_mask


def intervals(
    seq_lens: ArrayLike, spans: ArrayLike, *, seq_len: int, mask: str
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The keys that each token of one sequence sees. For `ism`: Equation 5 of the ISM paper.

    Args:
        seq_lens: int[D], lengths of the documents. The rest of `seq_len` is padding.
        spans: int[S, 4] of start, end, kind, train; offsets count from the beginning of the sequence.
        seq_len: Tokens of the sequence, T.
        mask: `ism`, `causal` or `prefix`.

    Returns:
        doc_start, kv_end: int32[T] each. Token t sees the keys [doc_start[t], kv_end[t]).

    Raises:
        DataError: If the spans do not tile the documents.
        UsageError: If the mask is unknown.
    """
    doc_start, kv_end = tiled_intervals(_tile_one(seq_lens, spans, seq_len), mask=mask)
    return doc_start.astype(np.int32, copy=False), kv_end.astype(np.int32, copy=False)


def targets(seq_lens: ArrayLike, spans: ArrayLike, *, seq_len: int, mask: str) -> NDArray[np.uint8]:
    """Which tokens of one sequence are trained.

    A token is a target if and only if it is in an answer that is trained and is not the first token of its document.
    Under `prefix` only the document's last answer counts, because an earlier one would see itself.

    Args:
        seq_lens: int[D], lengths of the documents.
        spans: int[S, 4], as for `intervals`.
        seq_len: Tokens of the sequence, T.
        mask: `ism`, `causal` or `prefix`.

    Returns:
        uint8[T], 1 for targets.

    Raises:
        DataError: If the spans do not tile the documents.
        UsageError: If the mask is unknown.
    """
    return tiled_targets(_tile_one(seq_lens, spans, seq_len), mask=mask)


def position_ids(seq_lens: ArrayLike, *, seq_len: int) -> NDArray[np.int32]:
    """Positions that start at 0 in every document.

    Args:
        seq_lens: int[D], lengths of the documents. The rest of `seq_len` is padding.
        seq_len: Tokens of the sequence, T.

    Returns:
        int32[T]; 0 for padding.

    >>> position_ids([2, 3], seq_len=6).tolist()
    [0, 1, 0, 1, 2, 0]
    """
    lens = np.asarray(seq_lens, np.int64)
    positions = np.zeros(seq_len, np.int32)
    used = int(lens.sum())
    positions[:used] = np.arange(used) - np.repeat(np.cumsum(lens) - lens, lens)
    return positions


def block_table(doc_start: ArrayLike, kv_end: ArrayLike, *, block_size: int = BLOCK_SIZE) -> NDArray[np.int16]:
    """Which blocks of keys each block of rows sees, and which of them without any masking.

    Args:
        doc_start: int[..., T].
        kv_end: int[..., T].
        block_size: Rows and keys of a block, B. T is a multiple of it.

    Returns:
        int16[..., T / B, 4]: visible_lo, visible_hi, full_lo, full_hi. Both ranges of blocks are half-open; `full` is
        empty if full_hi <= full_lo. Blocks that are visible but not full are partial.

    Raises:
        UsageError: If T is not a multiple of `block_size`.
    """
    lo = np.asarray(doc_start)
    hi = np.asarray(kv_end)
    if lo.shape[-1] % block_size:
        raise UsageError(f"a row has {lo.shape[-1]} tokens; expected a multiple of the block size {block_size}")
    lo = lo.reshape(*lo.shape[:-1], -1, block_size)
    hi = hi.reshape(*hi.shape[:-1], -1, block_size)
    columns = (
        lo.min(-1) // block_size,
        -(-hi.max(-1) // block_size),
        -(-lo.max(-1) // block_size),
        hi.min(-1) // block_size,
    )
    return np.stack(columns, axis=-1).astype(np.int16)


def dense(doc_start: ArrayLike, kv_end: ArrayLike, *, keys: int | None = None) -> NDArray[np.bool_]:
    """The whole mask. Its size is quadratic: use it for small examples and tests.

    Args:
        doc_start: int[..., T].
        kv_end: int[..., T].
        keys: Number of keys; T by default.

    Returns:
        bool[..., T, keys], True where a row sees a key.

    >>> dense([0, 0], [1, 2]).astype(int).tolist()
    [[1, 0], [1, 1]]
    """
    lo = np.asarray(doc_start)[..., None]
    hi = np.asarray(kv_end)[..., None]
    key = np.arange(lo.shape[-2] if keys is None else keys)
    return (key >= lo) & (key < hi)


def _tile_one(seq_lens: ArrayLike, spans: ArrayLike, seq_len: int) -> Tiling:
    lens = np.asarray(seq_lens, np.int64).reshape(-1)
    table = np.asarray(spans, np.int64).reshape(-1, 4)
    return tile([len(lens)], lens, [len(table)], table, seq_len=seq_len)
