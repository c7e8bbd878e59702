"""Spans to attention intervals, targets and block tables. numpy only; every mask is one array (design: docs/masks.md).

Row `t` of a sequence sees the keys `[doc_start[t], kv_end[t])`. The three masks differ in `kv_end` alone:

- `causal`: `t + 1`
- `ism`: the end of t's context block if t is in one, else `t + 1` (f(j), equation 5 of the paper)
- `prefix`: the start of the document's last answer for every t before it, else `t + 1`; a document without answers
  sees all of itself

A context block is a maximal run of spans that are not answers. Padding sees itself alone, so no row is ever empty.

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

#: The label of a token that is no target; PyTorch's losses leave it out.
IGNORE_INDEX = -100

#: Block size of the stored block tables; sequence lengths are multiples of it.
BLOCK_SIZE = 128

IntArray = NDArray[np.int64]
OffsetArray = NDArray[np.signedinteger[Any]]


class Tiling(NamedTuple):
    """Whole rows cut into pieces: every span and every stretch of padding, in order. All arrays are int64[S + pads].

    Offsets count over the rows laid end to end. `document` is -1 for padding.
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

    row_documents: int[R], documents per row. seq_lens: int[D], document lengths in order. row_spans: int[R], spans per
    row. spans: int[S, 4] of start, end, kind, train with offsets inside their row. Raises DataError when the spans do
    not tile the documents, naming the row; rows are counted from `first_row`.
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
    """Raise unless the spans are non-empty, in order, inside their row, and cut exactly at every document border."""
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
    """np.isin for few values in a sorted array, many times a second: a batch of a DataLoader is some hundred spans."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[at] == values
    return found


def tiled_intervals(tiling: Tiling, *, mask: str) -> tuple[OffsetArray, OffsetArray]:
    """doc_start, kv_end, [R * T] each, counted over the rows laid end to end (subtract `row * T` for offsets).

    int32, half the memory to go through, unless R * T is more than that holds; then int64.
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
        next_goes_on = np.zeros(len(end), bool)
        next_goes_on[:-1] = context[1:] & (tiling.document[1:] == tiling.document[:-1])
        block_end = np.where(context & ~next_goes_on, end, tokens)
        block_end = np.minimum.accumulate(block_end[::-1])[::-1]
        open_end = np.where(context, block_end, 0)
    else:
        open_end = _last_answer_start(tiling)
        open_end = np.where(tiling.start < open_end, open_end, 0)
    kv_end: OffsetArray = np.repeat(open_end.astype(dtype), tiling.length)
    position += 1
    return doc_start, np.maximum(kv_end, position, out=kv_end)


def _last_answer_start(tiling: Tiling) -> IntArray:
    """For every piece, where its document's last answer starts: the document's end if it has none, 0 for padding."""
    documents = int(tiling.document.max(initial=-1)) + 1
    last = np.zeros(documents + 1, np.int64)  # the extra place at the end belongs to padding (document -1)
    np.maximum.at(last, tiling.document, np.where(tiling.document < 0, 0, tiling.start + tiling.length))
    answers = tiling.kind == ANSWER
    last[tiling.document[answers]] = tiling.start[answers]  # pieces are in order, so the last answer stays
    return last[tiling.document]


def tiled_targets(tiling: Tiling, *, mask: str) -> NDArray[np.uint8]:
    """The loss mask as uint8[R * T]: 1 where a token is a target."""
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
    """The keys each row of one sequence sees: `doc_start`, `kv_end`, int32[T] each, half-open.

    seq_lens: int[D], document lengths; what they leave of `seq_len` is padding. spans: int[S, 4] of start, end, kind,
    train, offsets in the sequence. Raises DataError when the spans do not tile the documents, UsageError for a mask
    that is none of ism, causal, prefix. Source: equation 5 of the paper for `ism`.
    """
    doc_start, kv_end = tiled_intervals(_one_row(seq_lens, spans, seq_len), mask=mask)
    return doc_start.astype(np.int32, copy=False), kv_end.astype(np.int32, copy=False)


def targets(seq_lens: ArrayLike, spans: ArrayLike, *, seq_len: int, mask: str) -> NDArray[np.uint8]:
    """Which tokens of one sequence are trained, uint8[T]. Arguments and errors as for `intervals`.

    A token is a target iff it lies in an answer that is to be trained and is not its document's first token; under
    `prefix` only the document's last answer counts, since an earlier one would see itself.
    """
    return tiled_targets(_one_row(seq_lens, spans, seq_len), mask=mask)


def position_ids(seq_lens: ArrayLike, *, seq_len: int) -> NDArray[np.int32]:
    """Positions that restart at 0 in every document, int32[T]; padding is at 0."""
    lens = np.asarray(seq_lens, np.int64)
    positions = np.zeros(seq_len, np.int32)
    used = int(lens.sum())
    positions[:used] = np.arange(used) - np.repeat(np.cumsum(lens) - lens, lens)
    return positions


def block_table(doc_start: ArrayLike, kv_end: ArrayLike, *, block_size: int = BLOCK_SIZE) -> NDArray[np.int16]:
    """What each block of rows sees of each block of keys, int16[T / B, 4]: visible_lo, visible_hi, full_lo, full_hi.

    Both ranges are half-open in block columns. `full` is empty where full_hi <= full_lo; partial = visible - full.
    Arguments are int[..., T], T a multiple of block_size; leading axes are kept. Raises UsageError otherwise.
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
    """The mask as bool[..., T, keys], True where a row sees a key. For eyes and tests: it is quadratic."""
    lo = np.asarray(doc_start)[..., None]
    hi = np.asarray(kv_end)[..., None]
    key = np.arange(lo.shape[-2] if keys is None else keys)
    return (key >= lo) & (key < hi)


def _one_row(seq_lens: ArrayLike, spans: ArrayLike, seq_len: int) -> Tiling:
    lens = np.asarray(seq_lens, np.int64).reshape(-1)
    table = np.asarray(spans, np.int64).reshape(-1, 4)
    return tile([len(lens)], lens, [len(table)], table, seq_len=seq_len)
