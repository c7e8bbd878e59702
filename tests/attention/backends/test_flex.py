"""FlexAttention's tables against torch's, its kernel against dense attention, and one kernel for all batches.

The block lists matter to compiled kernels alone; on a CPU only the forward pass can be compiled.
"""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.backends import flex
from ismdata.attention.backends.base import Intervals
from ismdata.attention.backends.flex import FLEX, block_lists, block_mask, block_table, interval_mask_mod
from ismdata.data.collate import Collator
from ismdata.errors import UnsupportedModelError, UsageError
from tests.support.decoders import decoder
from tests.support.tiny import ANSWER, PROMPT, QUERY, sample, tiny_model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def random_documents(generator, tokens):
    """Documents of random spans that fill `tokens` or a little less."""
    documents, left = [], tokens - int(generator.integers(0, 60))
    while left > 0:
        length = min(left, int(generator.integers(1, 400)))
        left -= length
        document = []
        while length > 0:
            span = min(length, int(generator.integers(1, 90)))
            document.append((int(generator.choice([PROMPT, QUERY, ANSWER])), span))
            length -= span
        documents.append(document)
    return documents


def random_batch(seed, *, rows=2, seq_len=1024, mask="ism"):
    generator = np.random.default_rng(seed)
    samples = [
        sample(random_documents(generator, seq_len), seq_len=seq_len, mask=mask, seed=seed + row) for row in range(rows)
    ]
    batch = Collator()(samples)
    batch.pop("labels")
    return batch


def intervals_of(batch, **changes):
    keys = batch["kv_end"].shape[1]
    named = {name: batch[name] for name in ("doc_start", "kv_end", "block_table")}
    return Intervals(**(named | {"keys": keys} | changes))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    mask=st.sampled_from(masks.MASKS),
    window=st.sampled_from([None, 1, 2, 100, 128, 129, 300, 4096]),
    stored=st.booleans(),
)
def test_block_masks_equal_stock_ones(seed, mask, window, stored):
    """All tables, forward and backward, against torch's `create_block_mask`, which evaluates every pair."""
    batch = random_batch(seed, seq_len=512, mask=mask)
    intervals = intervals_of(batch).windowed(window)
    if not stored:
        intervals = dataclasses.replace(intervals, block_table=None)
    found = block_mask(intervals)
    expected = create_block_mask(
        interval_mask_mod(intervals.doc_start, intervals.kv_end), B=2, H=None, Q_LEN=512, KV_LEN=512, device="cpu"
    )
    assert (found.seq_lengths, found.BLOCK_SIZE) == (expected.seq_lengths, expected.BLOCK_SIZE)
    for number, which in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        assert listed(found, number, which) == listed(expected, number, which), which


def listed(mask: BlockMask, number: str, which: str) -> list[list[list[int]]]:
    """The blocks that a table lists per row, without the entries past their number."""
    numbers, indices = getattr(mask, number)[:, 0], getattr(mask, which)[:, 0]
    assert numbers.dtype == indices.dtype == torch.int32
    assert 0 <= int(indices.min()) <= int(indices.max()) < indices.shape[-1]
    return [
        [sorted(row[:count].tolist()) for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(indices, numbers.tolist(), strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), mask=st.sampled_from(masks.MASKS))
def test_the_block_table_on_the_device_is_the_stored_one(seed, mask):
    batch = random_batch(seed, seq_len=512, mask=mask)
    found = block_table(batch["doc_start"], batch["kv_end"])
    assert found.tolist() == masks.block_table(batch["doc_start"].numpy(), batch["kv_end"].numpy()).tolist()
    assert found.tolist() == batch["block_table"].tolist()


def test_block_lists_of_one_row():
    """Seen: blocks 1 to 6, of these 3 and 4 fully; and a row without a full block."""
    table = torch.tensor([[[1, 7, 3, 5]] * 4 + [[2, 5, 4, 2]] * 4])
    partial_number, partial, full_number, full = block_lists(table)
    assert partial_number[0, 0].tolist() == [4] * 4 + [3] * 4
    assert full_number[0, 0].tolist() == [2] * 4 + [0] * 4
    assert partial[0, 0, 0, :4].tolist() == [1, 2, 5, 6]
    assert full[0, 0, 0, :2].tolist() == [3, 4]
    assert partial[0, 0, 4, :3].tolist() == [2, 3, 4]


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@needs_compiler
def test_one_compiled_kernel_is_used_for_all_batches_layers_and_windows():
    """One graph for other documents, masks and tables. Compiled on the CPU, which uses the lists of blocks too."""
    model = attach(decoder("gemma3", dtype=torch.float32), backend="flex")
    dense = attach(decoder("gemma3", dtype=torch.float32), backend="sdpa")
    torch.compiler.reset()
    before = graphs()
    for seed, mask in enumerate(["ism", "causal", "prefix", "ism"]):
        batch = random_batch(seed, mask=mask)
        if seed == 3:
            batch.pop("block_table")
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=0, atol=2e-5)
    assert graphs() == before + 1


def test_too_many_kernels_are_an_error(monkeypatch):
    """At its recompile limit torch would continue without kernels, in quadratic memory, after a warning."""
    compiled = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "COMPILED_CPU_ROWS", 128)
    torch.compiler.reset()
    model = attach(tiny_model(dtype=torch.float32), backend="flex")  # the canary takes one: one sample of 128 tokens
    monkeypatch.setattr(flex, "MOST_KERNELS", 2)
    with torch.no_grad():
        for seed in range(3):
            model(**random_batch(seed, seq_len=256))
        with pytest.raises(
            UsageError, match=r"compiled 2 kernels.*\[2, 4, 384, 8\].*Keep seq_len and batch size fixed"
        ):
            model(**random_batch(0, seq_len=384))
    torch.compiler.reset()


def test_gradients_on_a_cpu_are_refused():
    model = attach(tiny_model(), backend="flex")
    loss = model(**random_batch(0, seq_len=128)).logits.sum()
    with pytest.raises(
        UnsupportedModelError, match=r"the backend flex cannot compute gradients: .*no backward pass on a CPU.*sdpa"
    ):
        loss.backward()


def test_rows_that_are_no_multiple_of_the_block_size_are_refused():
    model = attach(tiny_model(), backend="flex")
    batch = {name: tensor[:, :100] for name, tensor in random_batch(0, seq_len=128).items() if name != "block_table"}
    with pytest.raises(UsageError, match="samples of 100 tokens; the backend flex needs a multiple of 128"):
        model(**batch)


def test_attention_dropout_is_refused():
    model = attach(decoder("llama", attention_dropout=0.1), backend="flex")
    model(**random_batch(0, seq_len=128))
    with pytest.raises(UnsupportedModelError, match=r"attention dropout 0\.1, which the backend flex cannot compute"):
        model.train()(**random_batch(0, seq_len=128))


def test_what_is_missing_is_named(monkeypatch):
    cuda = torch.device("cuda")
    assert FLEX.missing(torch.device("cpu")) is None
    assert "CUDA devices and CPUs only; found mps" in FLEX.missing(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in FLEX.missing(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in FLEX.missing(cuda)
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "compute capability 7.0" in FLEX.missing(cuda)


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_on_a_gpu_forward_and_backward_equal_dense_attention(name):
    models = [attach(decoder(name, dtype=torch.float32).to("cuda"), backend=backend) for backend in ("flex", "sdpa")]
    torch.compiler.reset()
    before = graphs()
    for seed in range(3):
        batch = {key: tensor.to("cuda") for key, tensor in random_batch(seed).items()}
        gradients = []
        for model in models:
            model.zero_grad()
            model(**batch).logits.logsumexp(-1).mean().backward()
            gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
        for key, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][key], gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()))
    assert graphs() == before + 1
