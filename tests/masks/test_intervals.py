"""The masks are compared with brute-force vectors and, on random documents, with a token-by-token oracle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata import masks
from ismdata.errors import DataError, UsageError
from tests.support import oracle
from tests.support.paths import SHARED

GOLDEN = SHARED / "golden" / "masks.json"
KINDS = {"prompt": masks.PROMPT, "query": masks.QUERY, "answer": masks.ANSWER}


def golden_cases():
    if not GOLDEN.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"the golden vectors are not here: {GOLDEN}"))]
    return [pytest.param(case, id=f"{case['name']}-{case['mask']}") for case in json.loads(GOLDEN.read_text())]


def arrays_of(case):
    seq_lens = [doc[-1]["end"] - doc[0]["start"] for doc in case["documents"]]
    spans = [(s["start"], s["end"], KINDS[s["kind"]], s["train"]) for doc in case["documents"] for s in doc]
    return seq_lens, np.array(spans, np.int64).reshape(-1, 4)


@pytest.mark.parametrize("case", golden_cases())
def test_golden(case):
    seq_lens, spans = arrays_of(case)
    seq_len, mask, block_size = case["seq_len"], case["mask"], case["block_size"]
    doc_start, kv_end = masks.intervals(seq_lens, spans, seq_len=seq_len, mask=mask)
    assert doc_start.tolist() == case["doc_start"]
    assert kv_end.tolist() == case["kv_end"]
    assert masks.targets(seq_lens, spans, seq_len=seq_len, mask=mask).tolist() == case["loss_mask"]
    assert masks.position_ids(seq_lens, seq_len=seq_len).tolist() == case["position_ids"]
    if case["dense"] is not None:
        rows = masks.dense(doc_start, kv_end).astype(int)
        assert ["".join(map(str, row)) for row in rows] == case["dense"]
    if seq_len % block_size == 0:
        table = masks.block_table(doc_start, kv_end, block_size=block_size)
        for (any_lo, any_hi, full_lo, full_hi), expected in zip(table.tolist(), case["blocks"], strict=True):
            assert list(range(any_lo, any_hi)) == expected["any"]
            assert list(range(full_lo, full_hi)) == expected["full"]


# ---- against the oracle ----

SPAN = st.tuples(st.integers(1, 6), st.sampled_from([oracle.PROMPT, oracle.QUERY, oracle.ANSWER]), st.booleans())
DOCUMENT = st.lists(SPAN, min_size=1, max_size=6)


@st.composite
def rows(draw):
    """One to four sequences of the same seq_len, from empty to full."""
    packed = draw(st.lists(st.lists(DOCUMENT, max_size=4), min_size=1, max_size=4))
    longest = max(sum(length for spans in row for length, _, _ in spans) for row in packed)
    seq_len = -(-max(longest, 1) // 8) * 8
    if draw(st.booleans()):
        seq_len += 8
    return [oracle.Row(row, seq_len) for row in packed]


def tile(rows, **options):
    return masks.tile(
        [len(row.seq_lens) for row in rows],
        [length for row in rows for length in row.seq_lens],
        [len(row.spans) for row in rows],
        [span for row in rows for span in row.spans],
        seq_len=rows[0].seq_len,
        **options,
    )


@given(rows(), st.sampled_from(masks.MASKS))
@settings(max_examples=200, deadline=None)
def test_one_row_equals_the_oracle(rows, mask):
    for row in rows:
        doc_start, kv_end = masks.intervals(row.seq_lens, row.spans, seq_len=row.seq_len, mask=mask)
        visible = row.visible(mask)
        assert [list(range(lo, hi)) for lo, hi in zip(doc_start, kv_end, strict=True)] == visible
        assert doc_start.dtype == kv_end.dtype == np.int32
        loss_mask = masks.targets(row.seq_lens, row.spans, seq_len=row.seq_len, mask=mask)
        assert loss_mask.tolist() == row.loss_mask(mask)
        assert loss_mask.dtype == np.uint8
        assert masks.position_ids(row.seq_lens, seq_len=row.seq_len).tolist() == row.position_ids()
        assert masks.block_table(doc_start, kv_end, block_size=8).tolist() == oracle.block_table(visible, 8)
        assert masks.dense(doc_start, kv_end).sum() == sum(map(len, visible))


@given(rows(), st.sampled_from(masks.MASKS))
@settings(max_examples=200, deadline=None)
def test_many_rows_equal_their_rows(rows, mask):
    tiling, seq_len = tile(rows), rows[0].seq_len
    base = np.repeat(np.arange(len(rows)) * seq_len, seq_len)
    doc_start, kv_end = (offsets - base for offsets in masks.tiled_intervals(tiling, mask=mask))
    loss_mask = masks.tiled_targets(tiling, mask=mask)
    visible = [keys for row in rows for keys in row.visible(mask)]
    assert [list(range(lo, hi)) for lo, hi in zip(doc_start, kv_end, strict=True)] == visible
    assert loss_mask.tolist() == [target for row in rows for target in row.loss_mask(mask)]
    shape = (len(rows), seq_len)
    table = masks.block_table(doc_start.reshape(shape), kv_end.reshape(shape), block_size=8)
    assert table.tolist() == [oracle.block_table(row.visible(mask), 8) for row in rows]


@given(rows())
@settings(deadline=None)
def test_a_tiling_covers_every_token_once(rows):
    tiling = tile(rows)
    assert tiling.start.tolist() == (np.cumsum(tiling.length) - tiling.length).tolist()
    assert tiling.length.sum() == len(rows) * rows[0].seq_len
    assert (tiling.length > 0).all()


@given(rows(), st.sampled_from(masks.MASKS))
@settings(deadline=None)
def test_no_target_is_seen_by_the_token_that_predicts_it(rows, mask):
    tiling = tile(rows)
    _, kv_end = masks.tiled_intervals(tiling, mask=mask)
    target = np.flatnonzero(masks.tiled_targets(tiling, mask=mask))
    assert (kv_end[target - 1] <= target).all()


@given(rows(), st.data())
@settings(max_examples=200, deadline=None)
def test_spans_that_do_not_tile_are_refused(rows, data):
    """One border moved, one span dropped, doubled or moved: always an error, never a wrong mask."""
    place = [(number, at) for number, row in enumerate(rows) for at in range(len(row.spans))]
    if not place:
        return
    number, at = data.draw(st.sampled_from(place))
    spans = rows[number].spans
    start, end, kind, train = spans[at]
    change = data.draw(st.sampled_from(["start", "end", "drop", "double", "move", "row"]))
    if change == "start":
        spans[at] = (start + data.draw(st.sampled_from([-1, 1])), end, kind, train)
    elif change == "end":
        spans[at] = (start, end + data.draw(st.sampled_from([-1, 1])), kind, train)
    elif change == "drop":
        del spans[at]
    elif change == "double":
        spans.insert(at, spans[at])
    elif change == "move":
        spans.append(spans.pop(at))
        if at == len(spans) - 1:
            return
    else:
        spans[at] = (start + rows[0].seq_len, end + rows[0].seq_len, kind, train)
    with pytest.raises(DataError, match=r"row \d+"):
        tile(rows)


# ---- errors, literally ----


def test_a_span_in_the_neighbour_row_is_refused():
    with pytest.raises(DataError, match=r"row 0: a span of tokens 8 to 16; expected 0 to 8"):
        masks.tile([1, 1], [8, 8], [2, 0], [(0, 8, 0, 0), (8, 16, 2, 1)], seq_len=8)


@pytest.mark.parametrize(
    ("seq_lens", "spans", "message"),
    [
        (
            [4],
            [(0, 2, 0, 0), (3, 4, 2, 1)],
            "row 7: a gap between spans at token 3; expected spans that tile each document",
        ),
        ([4], [(0, 3, 0, 0), (2, 4, 2, 1)], "row 7: spans that overlap or are out of order at token 2"),
        ([4], [(0, 4, 0, 0), (4, 4, 2, 1)], "row 7: an empty or reversed span at token 4"),
        ([2, 2], [(0, 4, 2, 1)], "row 7: a span that crosses a document border, or a document without spans"),
        (
            [2, 2],
            [(0, 2, 2, 1)],
            "row 7: a span that crosses a document border, or a document without spans at token 2",
        ),
        ([4], [], "row 7: no span at token 0"),
        (
            [4],
            [(0, 4, 3, 0)],
            r"row 7: the span at token 0 has kind 3; expected 0 \(prompt\), 1 \(query\) or 2 \(answer\)",
        ),
        ([5, 4], [(0, 5, 0, 0), (5, 9, 0, 0)], r"row 7: documents fill 9 tokens; expected at most 8 \(seq_len\)"),
        ([4, 0], [(0, 4, 0, 0)], "row 7: a document has length 0; expected at least 1"),
    ],
)
def test_errors_name_row_and_token(seq_lens, spans, message):
    with pytest.raises(DataError, match=message):
        masks.tile([len(seq_lens)], seq_lens, [len(spans)], spans, seq_len=8, first_row=7)


def test_an_unknown_mask_is_refused():
    with pytest.raises(UsageError, match="mask is 'full'; expected one of ism, causal, prefix"):
        masks.intervals([1], [(0, 1, 2, 1)], seq_len=8, mask="full")
    with pytest.raises(UsageError, match="mask is 'full'"):
        masks.targets([1], [(0, 1, 2, 1)], seq_len=8, mask="full")


def test_a_block_table_needs_whole_blocks():
    with pytest.raises(UsageError, match="a row has 9 tokens; expected a multiple of the block size 8"):
        masks.block_table(np.zeros(9), np.ones(9), block_size=8)
