"""The backend `varlen` inside models: training, caches, layers that it refuses (test_decoders.py has all decoders)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.backends import varlen
from ismdata.attention.backends.base import Intervals
from ismdata.attention.backends.registry import BACKENDS
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.errors import UnsupportedModelError, UsageError
from ismdata.masks.varlen_tables import NAMES
from tests.laws import test_laws
from tests.support.tiny import ANSWER, PROMPT, QUERY, SIZES, sample, tiny_model, write_packed

DOCUMENTS = [
    [(PROMPT, 2), (QUERY, 3), (ANSWER, 4), (QUERY, 2), (ANSWER, 3)],
    [(QUERY, 6), (ANSWER, 5), (QUERY, 1), (ANSWER, 1)],
]


def batch_of(mask: str = "ism", rows: int = 2, *, tables: bool = False):
    return Collator(tables=tables)([sample(DOCUMENTS, mask=mask, seed=seed) for seed in range(rows)])


@pytest.fixture
def passes(monkeypatch):
    """The operator's calls: the number of rows of each pass 2."""
    calls = []
    real = varlen._forward
    monkeypatch.setattr(varlen, "_forward", lambda *args: calls.append(len(args[5])) or real(*args))
    return calls


@pytest.mark.parametrize("mask", ["ism", "causal"])
def test_law_1_is_computed_in_two_passes(passes, mask):
    """test_laws.py has the laws with each backend; this test checks that the operator computes them."""
    test_laws.test_law_1_one_pass_equals_k_passes("llama", "varlen", mask)
    assert (max(passes) > 0) == (mask == "ism")


@pytest.mark.parametrize("mask", masks.MASKS)
def test_law_4_is_computed_in_two_passes(passes, mask):
    test_laws.test_law_4_a_token_changes_exactly_the_rows_that_see_it("llama", "varlen", mask)
    assert (max(passes) > 0) == (mask != "causal")


def gradients(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected, *, within: float = 2e-6):
    """Losses, and gradients relative to the largest of each; the models' norms compute in float32 in any dtype."""
    torch.testing.assert_close(found[0], expected[0], rtol=within, atol=0)
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=within * scale)


def test_autocast_decides_the_dtype(monkeypatch):
    """Under autocast, norms and rotations return float32 queries beside bfloat16 values."""
    dtypes = []
    real = varlen._forward
    monkeypatch.setattr(
        varlen, "_forward", lambda *args: dtypes.append({each.dtype for each in args[:3]}) or real(*args)
    )
    model = attach(tiny_model("qwen3", dtype=torch.float32), backend="varlen")
    exact = gradients(model, batch_of())
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model, batch_of())
    assert dtypes == [{torch.bfloat16}] * 2
    assert_same(rough, exact, within=0.1)


def test_training_with_tables_from_workers_is_training_with_sdpa(tmp_path):
    """A few steps over a DataLoader, whose worker adds the tables to the batches."""
    samples = [sample(DOCUMENTS * (1 + seed % 2), seed=seed) for seed in range(6)]
    dataset = PackedDataset(write_packed(tmp_path / "packed", samples))

    def losses(backend, collator, **options):
        model = attach(tiny_model(), backend=backend).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for batch in DataLoader(dataset, batch_size=2, collate_fn=collator, **options):
            assert all(name in batch for name in NAMES) == collator.tables
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    found = losses("varlen", Collator(tables=True), num_workers=1)
    assert found == pytest.approx(losses("sdpa", Collator()), rel=1e-5)
    assert found[0] != found[-1]


def test_calls_with_a_cache_are_computed_densely(passes):
    """A prefill with the keys of a cache before it, and a decoded token."""
    model = attach(tiny_model(), backend="varlen")
    batch = {name: tensor[:1, :12] for name, tensor in batch_of().items() if name not in ("labels", "block_table")}
    batch["kv_end"] = batch["kv_end"].clamp(max=12)
    with torch.no_grad():
        expected = model(**batch).logits
        passes.clear()
        cache = DynamicCache(config=model.config)
        for part in (slice(0, 5), slice(5, 11)):
            piece = {name: tensor[:, part] for name, tensor in batch.items()}
            found = model(**piece, past_key_values=cache).logits
            torch.testing.assert_close(found, expected[:, part], rtol=0, atol=1e-9)
        cut = {name: tensor[:, 11:] for name, tensor in batch.items() if name in ("input_ids", "position_ids")}
        torch.testing.assert_close(model(**cut, past_key_values=cache).logits, expected[:, 11:], rtol=0, atol=1e-9)
    assert passes == []


def test_evaluation_with_sdpa_and_tables():
    """Another backend ignores the tables."""
    model = attach(tiny_model(), backend="sdpa")
    torch.testing.assert_close(model(**batch_of(tables=True)).loss, model(**batch_of()).loss)


# ---- one layer ----


def layer(batch: int = 2, rows: int = 12, *, width: int = 8, value_width: int = 8):
    """query [B, H, T, D], key and value of half the heads, and intervals of that many rows."""
    make = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, rows, width), (batch, 2, rows, width), (batch, 2, rows, value_width))
    query, key, value = (torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes)
    kv_end = torch.arange(1, rows + 1, dtype=torch.int32).clamp(min=rows - 3).expand(batch, -1)
    return query, key, value, Intervals(doc_start=torch.zeros_like(kv_end), kv_end=kv_end, keys=rows)


def call(backend: str, query, key, value, intervals, **options):
    chosen, module = BACKENDS[backend], nn.Module()
    module.num_key_value_groups = 2
    return chosen.attention(module, query, key, value, None, interval_mask=chosen.prepare(intervals), **options)[0]


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (6, 6), (12, 8), (5, 9)])
def test_heads_of_any_width(width, value_width, scaling):
    made = layer(width=width, value_width=value_width)
    found = call("varlen", *made, scaling=scaling)
    assert found.shape == (2, 12, 4, value_width)
    torch.testing.assert_close(found, call("sdpa", *made, scaling=scaling), rtol=0, atol=1e-12)


def test_refused_layers():
    made = layer()
    with pytest.raises(UnsupportedModelError, match=r"dropout 0\.1, .*attention_dropout to 0"):
        call("varlen", *made, dropout=0.1)
    with pytest.raises(UnsupportedModelError, match="requires softcap"):
        call("varlen", *made, softcap=30.0)
    query, key, value, intervals = made
    with pytest.raises(UnsupportedModelError, match="has 6 rows"):
        call("varlen", query[:, :, :6], key[:, :, :6], value[:, :, :6], intervals)
    with pytest.raises(UnsupportedModelError, match="got no interval_mask"):
        BACKENDS["varlen"].attention(nn.Module(), query, key, value, None)


def test_what_flash_attention_cannot_compute_is_refused():
    """Checked on a GPU only; a CPU computes both."""
    half, single = (torch.empty(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    varlen._check_flash(nn.Module(), half, 256)
    with pytest.raises(UnsupportedModelError, match=r"in torch\.float32; .* Load the model in bfloat16"):
        varlen._check_flash(nn.Module(), single, 64)
    with pytest.raises(UnsupportedModelError, match=r"heads of width 264; .* 256 at most"):
        varlen._check_flash(nn.Module(), half, 264)


def test_a_model_with_attention_dropout_is_refused_when_it_trains():
    model = attach(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=0.1)), backend="varlen")
    model.eval()(**batch_of())
    with pytest.raises(UnsupportedModelError, match="attention_dropout to 0"):
        model.train()(**batch_of())


def test_other_intervals_are_refused():
    batch = batch_of()
    batch["kv_end"][0, 1] = 2  # a row of a context block that sees less than the others
    with pytest.raises(UsageError, match=r"row 0 of sample 0 .* Use the backend sdpa or flex"):
        attach(tiny_model(), backend="varlen")(**batch)


def test_what_is_missing_is_named(monkeypatch):
    assert varlen.missing(torch.device("cpu")) is None
    assert "NVIDIA GPUs; found mps" in varlen.missing(torch.device("mps"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without FlashAttention" in varlen.missing(torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or higher; cuda has 7.5" in varlen.missing(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert varlen.missing(torch.device("cuda")) is None
