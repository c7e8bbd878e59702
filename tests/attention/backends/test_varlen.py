"""Attention in two passes against dense attention under the same mask: outputs, gradients, tables, laws, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ismdata import masks
from ismdata.attention.backends import varlen
from ismdata.attention.backends.base import Intervals
from ismdata.attention.backends.varlen import Index, prepare, two_pass_attention, two_pass_backward, two_pass_forward
from ismdata.attention.backends.varlen_kernels import FlashKernel, Inputs, PlainKernel
from ismdata.errors import UsageError
from ismdata.masks import varlen_tables
from tests.support.tiny import ANSWER, PROMPT, QUERY, spans_of

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


# ---- samples ----

SPANS = st.tuples(st.sampled_from([PROMPT, QUERY, ANSWER]), st.sampled_from([1, 1, 2, 3, 5, 9, 20]))
DOCUMENTS = st.lists(st.lists(SPANS, min_size=1, max_size=5), min_size=0, max_size=4)


@st.composite
def micro_batches(draw, samples: int = 3):
    """doc_start, kv_end, int32[B, T]: samples of random documents and padding, all under one mask."""
    mask = draw(st.sampled_from(masks.MASKS))
    drawn = draw(st.lists(DOCUMENTS, min_size=1, max_size=samples))
    packed = [spans_of(documents) for documents in drawn]
    seq_len = max(1, max(sum(lens) for lens, _ in packed)) + draw(st.sampled_from([0, 1, 2, 200]))
    rows = [masks.intervals(lens, spans, seq_len=seq_len, mask=mask) for lens, spans in packed]
    doc_start, kv_end = (np.stack(each) for each in zip(*rows, strict=True))
    return doc_start, kv_end


def intervals_of(doc_start, kv_end, *, batch=None, device="cpu") -> Intervals:
    return Intervals(
        doc_start=torch.from_numpy(doc_start).to(device),
        kv_end=torch.from_numpy(kv_end).to(device),
        keys=doc_start.shape[1],
        tables={name: torch.from_numpy(array).to(device) for name, array in (batch or {}).items()},
    )


def tensors(rows: int, *, heads: int = 2, groups: int = 2, width: int = 4, dtype=torch.float64, device="cpu", seed=0):
    """query [R, H, D], key and value [R, G, D], and a gradient of the output; scores are up to 10 or so."""
    make = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, width), (rows, groups, width), (rows, groups, width), (rows, heads, width))
    return [(2 * torch.randn(shape, generator=make, dtype=torch.float64)).to(device, dtype) for shape in shapes]


# ---- the oracle ----


def seen(doc_start, kv_end, window: int | None = None) -> Tensor:
    """bool[R, R] over the samples laid end to end, each row by the definition."""
    batch, length = doc_start.shape
    sees = torch.zeros(batch * length, batch * length, dtype=torch.bool)
    for sample in range(batch):
        for row in range(length):
            first = doc_start[sample, row] if window is None else max(doc_start[sample, row], row - window + 1)
            at = sample * length
            sees[at + row, at + first : at + kv_end[sample, row]] = True
    return sees


def dense(query, key, value, gradient, sees, scale):
    """The output and the gradients of query, key and value, by autograd through a softmax over all keys."""
    query, key, value = (each.detach().requires_grad_() for each in (query, key, value))
    times = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(times, 1)) * scale
    weights = scores.masked_fill(~sees.to(scores.device), -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(times, 1))
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), gradient)]


def two_passes(query, key, value, gradient, index, **options):
    inputs = Inputs(*(each.detach().requires_grad_() for each in (query, key, value)))
    out = two_pass_attention(inputs, index, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def assert_equal(found, expected, **tolerance):
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- the mathematics ----


@settings(max_examples=60, deadline=None)
@given(
    intervals=micro_batches(),
    groups=st.sampled_from([1, 2, 4]),
    times=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 2, 7, 1000]),
    scale=st.sampled_from([None, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_two_passes_equal_dense_attention(intervals, groups, times, width, window, scale, seed):
    doc_start, kv_end = intervals
    made = tensors(doc_start.size, heads=groups * times, groups=groups, width=width, seed=seed)
    index = prepare(intervals_of(doc_start, kv_end)).index
    found = two_passes(*made, index, window=window, scale=scale)
    expected = dense(*made, seen(doc_start, kv_end, window), width**-0.5 if scale is None else scale)
    assert_equal(found, expected, **EXACT)


SHORT = [[(PROMPT, 3), (QUERY, 4), (ANSWER, 2), (QUERY, 2), (ANSWER, 3)], [(QUERY, 2), (ANSWER, 6)]]
LONG = [[(PROMPT, 300), (QUERY, 400), (ANSWER, 90), (QUERY, 270), (ANSWER, 3)], [(QUERY, 2), (ANSWER, 600)]]


def intervals_under(mask: str, documents, seq_len: int):
    """doc_start, kv_end, int32[1, T] of one sample."""
    lens, spans = spans_of(documents)
    return tuple(each[None] for each in masks.intervals(lens, spans, seq_len=seq_len, mask=mask))


def long_intervals(mask: str, seq_len: int = 2048):
    """Documents and blocks of several chunks each, and padding."""
    return intervals_under(mask, LONG, seq_len)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 257, 1062])
@pytest.mark.parametrize("mask", masks.MASKS)
def test_documents_longer_than_a_chunk(mask, window):
    """The last window hides one key from one row: the longest document is a token longer."""
    doc_start, kv_end = long_intervals(mask, seq_len=1792)
    made = tensors(doc_start.size)
    index = prepare(intervals_of(doc_start, kv_end)).index
    assert index.longest_document == 1063
    found = two_passes(*made, index, window=window, scale=0.1)
    assert_equal(found, dense(*made, seen(doc_start, kv_end, window), 0.1), **EXACT)


def test_scores_beyond_exp_stay_finite():
    """exp of scores of thousands overflows, unless it is taken of their difference to the log-sum-exp only."""
    doc_start, kv_end = long_intervals("ism", seq_len=1792)
    query, key, value, gradient = tensors(doc_start.size)
    made = (40 * query, 40 * key, value, gradient)
    found = two_passes(*made, prepare(intervals_of(doc_start, kv_end)).index)
    assert all(each.isfinite().all() for each in found)
    assert_equal(found, dense(*made, seen(doc_start, kv_end), 0.5), rtol=0, atol=1e-7)  # eps of scores of 10^4


def test_the_log_sum_exp_is_that_of_all_keys():
    doc_start, kv_end = long_intervals("ism")
    query, key, value, _ = tensors(doc_start.size)
    index = prepare(intervals_of(doc_start, kv_end)).index
    _, lse = two_pass_forward(PlainKernel(), Inputs(query, key, value), index, None, 0.5)
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.5
    expected = scores.masked_fill(~seen(doc_start, kv_end), -torch.inf).logsumexp(-1)
    several = torch.ones(doc_start.size, dtype=torch.bool)
    several[index.alone] = False
    torch.testing.assert_close(lse[:, several], expected[:, several], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_narrow_dtypes_are_as_exact_as_dense_attention_in_them(dtype):
    doc_start, kv_end = long_intervals("ism", seq_len=1792)
    made = [each.to(dtype) for each in tensors(doc_start.size)]
    sees = seen(doc_start, kv_end)
    found = two_passes(*made, prepare(intervals_of(doc_start, kv_end)).index)
    exact = dense(*(each.double() for each in made), sees, 0.5)
    for ours, right, plain in zip(found, exact, dense(*made, sees, 0.5), strict=True):
        assert ours.dtype == dtype
        assert (ours - right).norm() < 4 * (plain - right).norm()


# ---- the tables ----


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(intervals=micro_batches(samples=4))
def test_tables_cover_each_pair_of_the_mask_once(intervals):
    doc_start, kv_end = intervals
    table = varlen_tables.tables(doc_start, kv_end)
    alone = set(table.alone.tolist())
    pairs = [(row, row) for row in table.alone.tolist()]
    pieces = [range(*ends) for ends in zip(table.documents[:-1].tolist(), table.documents[1:].tolist(), strict=True)]
    for piece in pieces:
        if alone.isdisjoint(piece):
            pairs += [(row, key) for row in piece for key in range(piece.start, row + 1)]
        else:
            assert alone.issuperset(piece)
            assert len(piece) <= varlen_tables.PIECE
    blocks = [table.rows[slice(*ends)].tolist() for ends in zip(table.blocks[:-1], table.blocks[1:], strict=True)]
    for block in blocks:
        pairs += [(row, key + 1) for at, row in enumerate(block) for key in block[: at + 1]]
    assert sorted(pairs) == [tuple(pair) for pair in seen(doc_start, kv_end).nonzero().tolist()]
    assert table.longest_document == max(map(len, pieces))
    assert table.longest_block == max(map(len, blocks), default=0)
    assert len(set(table.rows.tolist())) == len(table.rows)
    assert {each.dtype for each in (table.documents, table.alone, table.rows, table.blocks)} == {np.dtype(np.int32)}


def test_padding_is_few_pieces():
    """Two samples of padding only: pieces of 128 rows, none across the border of the samples."""
    row = np.arange(320, dtype=np.int32)
    table = varlen_tables.tables(np.stack([row, row]), np.stack([row + 1, row + 1]))
    assert table.documents.tolist() == [0, 128, 256, 320, 448, 576, 640]
    assert len(table.alone) == 640


@pytest.mark.parametrize(
    ("doc_start", "kv_end", "row"),
    [
        ([0, 0, 0], [1, 1, 3], 1),  # a row does not see itself
        ([0, 0, 0], [3, 2, 3], 0),  # a row sees further than the next one, so they share no block
        ([0, 0, 0], [2, 3, 4], 0),  # one token ahead everywhere
        ([0, 0, 2], [3, 3, 3], 1),  # a row sees into the next document
        ([0, 0, 0], [1, 2, 4], 2),  # beyond the last key
        ([0, 0, 1], [1, 2, 3], 2),  # the start of a window, not of a document
        ([1, 1, 1], [1, 2, 3], 0),  # a row before its document's start
    ],
    ids=["blind", "uneven", "lookahead", "next-document", "beyond", "window", "before"],
)
def test_other_intervals_are_refused(doc_start, kv_end, row):
    plain = ([0, 0, 0], [1, 2, 3])
    with pytest.raises(UsageError, match=rf"row {row} of sample 1 sees the keys {doc_start[row]} to {kv_end[row]}; "):
        varlen_tables.tables([plain[0], doc_start], [plain[1], kv_end])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_tables_are_right_or_refused(data):
    """For any intervals the tables represent exactly these, or are refused."""
    length = data.draw(st.integers(1, 6))
    doc_start = np.array([[data.draw(st.integers(0, row)) for row in range(length)]])
    kv_end = np.array([[data.draw(st.integers(row + 1, length)) for row in range(length)]])
    try:
        index = prepare(intervals_of(doc_start, kv_end)).index
    except UsageError:
        return
    made = tensors(length)
    assert_equal(two_passes(*made, index), dense(*made, seen(doc_start, kv_end), 0.5), **EXACT)


def same_index(found: Index, expected: Index) -> bool:
    return all(
        torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
        for ours, theirs in zip(found, expected, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(intervals=micro_batches())
def test_tables_of_the_batch_are_used_as_they_are(intervals):
    """Nothing is copied to the host to be computed there."""
    batch = varlen_tables.tables(*intervals).as_batch()
    assert tuple(batch) == varlen_tables.NAMES
    expected = prepare(intervals_of(*intervals)).index
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(varlen_tables, "tables")
        assert same_index(prepare(intervals_of(*intervals, batch=batch)).index, expected)


@pytest.mark.parametrize(
    ("joined", "kept"),
    [(1, slice(0, 1)), (1, slice(1, 2)), (2, slice(0, 4)), (2, slice(0, 2)), (2, slice(2, 4))],
    ids=["first", "second", "joined", "joined-first", "joined-second"],
)
def test_tables_of_a_joined_or_split_batch_are_computed_again(joined, kept):
    """As accelerate joins batches and torch's DataParallel splits them: each tensor along its first axis."""
    doc_start, kv_end = (np.repeat(each, 2, axis=0) for each in intervals_under("ism", SHORT, 32))
    batch = {"doc_start": doc_start, "kv_end": kv_end, **varlen_tables.tables(doc_start, kv_end).as_batch()}
    batch = {name: np.concatenate([array] * joined)[kept] for name, array in batch.items()}
    doc_start, kv_end = batch.pop("doc_start"), batch.pop("kv_end")
    found = prepare(intervals_of(doc_start, kv_end, batch=batch)).index
    assert same_index(found, prepare(intervals_of(doc_start, kv_end)).index)


# ---- the operator ----


def operands(mask: str = "ism", *, documents=LONG, seq_len: int = 1792, **options):
    doc_start, kv_end = intervals_under(mask, documents, seq_len)
    query, key, value, gradient = tensors(doc_start.size, **options)
    index = prepare(intervals_of(doc_start, kv_end)).index
    index = Index(*(each.to(query.device) if isinstance(each, Tensor) else each for each in index))
    return query, key, value, gradient, index, 0.5


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["ism", "causal"])
def test_the_operators_pass_the_checks_of_torch(mask):
    """torch's own checks of schema, fake tensors, autograd and tracing."""
    query, key, value, gradient, index, scale = operands(mask, documents=SHORT, seq_len=32)
    passes = (*index, None, scale)
    query.requires_grad_()
    torch.library.opcheck(varlen._forward, (query, key, value, *passes))
    out, lse = (each.detach() for each in varlen._forward(query, key, value, *passes))
    whole = (gradient, query.detach(), key, value, out, lse, *passes)
    torch.library.opcheck(varlen._backward, whole)


def test_a_compiled_function_is_one_graph():
    query, key, value, gradient, index, _ = operands(documents=SHORT, seq_len=32)
    compiled = torch.compile(two_pass_attention, backend="aot_eager", fullgraph=True)
    found = []
    for attention in (two_pass_attention, compiled):
        leaf = query.clone().requires_grad_()
        out = attention(Inputs(leaf * 2, key, value), index)
        found.append([out.detach(), *torch.autograd.grad(out, leaf, gradient)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_flash_kernels_have_the_expected_signature_and_shapes():
    """On the device meta, which needs no GPU."""
    query, key, value, gradient, index, scale = operands(heads=4, dtype=torch.bfloat16, device="meta")
    for window in (None, 100):
        inputs = Inputs(query, key, value)
        out, lse = output = two_pass_forward(FlashKernel(), inputs, index, window, scale)
        assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((4, len(query)), torch.float32)
        found = two_pass_backward(FlashKernel(), gradient, inputs, output, index, window, scale)
        assert [each.shape for each in found] == [query.shape, key.shape, value.shape]


# ---- on a GPU ----

WIDTHS = (64, 96, 128, 256)


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("mask", masks.MASKS)
def test_flash_kernels_are_as_exact_as_flash_attention(mask, window, width, dtype):
    """Against dense attention in float64, compared with the error of torch's FlashAttention under the causal mask."""
    *made, index, _ = operands(mask, heads=8, width=width, dtype=dtype, device="cuda")
    scale = width**-0.5
    doc_start, kv_end = long_intervals(mask, seq_len=1792)
    sees = seen(doc_start, kv_end, window)
    exact = dense(*(each.double() for each in made), sees, scale)
    found = two_passes(*made, index, window=window, scale=scale)

    length = len(made[0])
    whole = index._replace(
        documents=torch.tensor([0, length], dtype=torch.int32, device="cuda"),
        **dict.fromkeys(("alone", "rows", "keys"), index.alone[:0]),
        blocks=torch.zeros(1, dtype=torch.int32, device="cuda"),
        longest_document=length,
    )
    causal = dense(*(each.double() for each in made), torch.ones(length, length, dtype=torch.bool).tril(), scale)
    for ours, right, plain, plain_right in zip(
        found, exact, two_passes(*made, whole, scale=scale), causal, strict=True
    ):
        error = (ours - right).norm() / right.norm()
        assert error < 2 * (plain - plain_right).norm() / plain_right.norm()


@ON_GPU
def test_no_layer_waits_for_the_device():
    doc_start, kv_end = long_intervals("ism")
    batch = varlen_tables.tables(doc_start, kv_end).as_batch()
    intervals = intervals_of(doc_start, kv_end, batch=batch, device="cuda")
    pinned = torch.from_numpy(batch["varlen_longest"]).pin_memory().to("cuda", non_blocking=True)
    assert pinned.shape == batch["varlen_longest"].shape
    made = tensors(doc_start.size, width=64, dtype=torch.bfloat16, device="cuda")
    two_passes(*made, prepare(intervals).index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        two_passes(*made, prepare(intervals).index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
def test_deterministic_algorithms_give_the_same_gradients():
    *made, index, scale = operands(heads=8, width=64, dtype=torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (two_passes(*made, index, scale=scale) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
