"""`attach` against stock eager attention with an additive mask: results, refusals, and what it leaves unchanged."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

from ismdata import masks
from ismdata.attention import canary
from ismdata.attention.attachment import attach, attached_backend, detach
from ismdata.attention.backends.base import Intervals, PerWindow
from ismdata.attention.backends.registry import BACKENDS, choose
from ismdata.attention.backends.sdpa import dense_attention, dense_mask
from ismdata.attention.model_folder import load
from ismdata.data.collate import Collator
from ismdata.errors import DataError, UnsupportedModelError, UsageError
from ismdata.masks import IGNORE_INDEX
from tests.support.reporters import Recorder
from tests.support.tiny import (
    ANSWER,
    ARCHITECTURES,
    PROMPT,
    QUERY,
    VOCABULARY,
    checkpoint_activations,
    sample,
    tiny_model,
)

DOCUMENTS = [
    [(PROMPT, 2), (QUERY, 3), (ANSWER, 4), (QUERY, 2), (ANSWER, 3)],
    [(QUERY, 6), (ANSWER, 5), (QUERY, 1), (ANSWER, 1)],
]


def batch_of(mask="ism", rows=2, **options):
    return Collator()([sample(DOCUMENTS, mask=mask, seed=seed, **options) for seed in range(rows)])


def eager_logits(model, batch):
    """The oracle: the stock model under eager attention and a dense additive mask."""
    oracle = copy.deepcopy(model)
    detach(oracle)
    oracle.set_attn_implementation("eager")
    sees = torch.from_numpy(masks.dense(batch["doc_start"], batch["kv_end"]))[:, None]
    additive = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
    with torch.no_grad():
        return oracle(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=additive, use_cache=False
        ).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mask", masks.MASKS)
def test_logits_equal_stock_eager_attention(architecture, mask):
    model = attach(tiny_model(architecture))
    batch = batch_of(mask)
    with torch.no_grad():
        logits = model(**batch).logits
    # Eager attention computes its softmax in float32.
    torch.testing.assert_close(logits, eager_logits(model, batch), rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_targets():
    model = attach(tiny_model())
    batch = batch_of()
    output = model(**batch)
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)
    count = int((batch["labels"] != IGNORE_INDEX).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=4 * count).loss * 4, output.loss)


def test_loss_weight_multiplies_each_target():
    model = attach(tiny_model())
    weight = np.random.default_rng(0).random(128).astype(np.float32)
    batch = batch_of(loss_weight=weight)
    output = model(**batch)
    each = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    summed = (each * batch["loss_weight"][:, 1:].flatten()).sum()
    targets = (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(output.loss.double(), summed / targets, rtol=1e-6, atol=0)
    batch["loss_weight"] = torch.ones_like(batch["loss_weight"])
    torch.testing.assert_close(model(**batch).loss, model(**batch_of()).loss)
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * targets).loss * 2, model(**batch_of()).loss)
    with pytest.raises(UnsupportedModelError, match="shift_labels"):
        model(**batch, shift_labels=batch["labels"])


def test_a_model_that_ignores_loss_weight_refuses_it():
    class OwnLoss(type(tiny_model())):
        def forward(self, *args, labels=None, loss_weight=None, **kwargs):
            return super().forward(*args, labels=labels, **kwargs)

    torch.manual_seed(0)
    model = attach(OwnLoss(tiny_model().config))
    model(**batch_of())
    with pytest.raises(UnsupportedModelError, match="would ignore loss_weight"):
        model(**batch_of(loss_weight=np.ones(128, np.float32)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointing):
        model = attach(tiny_model(dtype=torch.float32)).train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        model(**batch_of()).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_bfloat16_stays_near_float32():
    batch = batch_of()
    with torch.no_grad():
        exact = attach(tiny_model(dtype=torch.float32))(**batch)
        rough = attach(tiny_model(dtype=torch.bfloat16))(**batch)
    assert rough.logits.dtype == torch.bfloat16
    assert rough.logits.isfinite().all()
    assert abs(float(rough.loss) - float(exact.loss)) < 0.05 * float(exact.loss)


def test_the_mask_is_built_once_per_micro_batch(monkeypatch):
    built = []
    real = BACKENDS["sdpa"]
    counting = dataclasses.replace(
        real, prepare=lambda intervals: PerWindow(intervals, lambda each: built.append(each.keys) or dense_mask(each))
    )
    monkeypatch.setitem(BACKENDS, "sdpa", counting)
    model = attach(tiny_model())
    built.clear()
    model(**batch_of())
    assert built == [128]


def test_missing_positions_follow_from_the_documents():
    model = attach(tiny_model())
    batch = batch_of()
    with torch.no_grad():
        given = model(**batch).logits
        batch.pop("position_ids")
        torch.testing.assert_close(model(**batch).logits, given, rtol=0, atol=0)


def test_training_returns_no_cache_unless_asked():
    model = attach(tiny_model())
    assert model(**batch_of()).past_key_values is None
    cached = model(**batch_of(), use_cache=True)
    assert cached.past_key_values.get_seq_length() == 128
    torch.testing.assert_close(cached.logits, model(**batch_of()).logits)


def test_generate_continues_from_a_prefilled_cache():
    """Decoding needs no intervals, and chooses the tokens that full forward passes choose."""
    model = attach(tiny_model())
    prompt = torch.randint(2, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))

    def full(tokens):
        """Logits of `tokens`, the first nine of them a context block."""
        length = tokens.shape[1]
        kv_end = torch.arange(1, length + 1)[None].clamp(min=9)
        return model(input_ids=tokens, doc_start=torch.zeros_like(kv_end), kv_end=kv_end).logits[0, -1]

    with torch.no_grad():
        tokens = prompt
        for _ in range(6):
            tokens = torch.cat([tokens, full(tokens).argmax()[None, None]], dim=1)
        cache = DynamicCache(config=model.config)
        kv_end = torch.full((1, 9), 9)
        model(input_ids=prompt, doc_start=torch.zeros_like(kv_end), kv_end=kv_end, past_key_values=cache)
        generated = model.generate(tokens[:, :10], past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert generated.tolist() == tokens.tolist()


def test_a_single_token_without_intervals_sees_everything():
    model = attach(tiny_model())
    tokens = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    kv_end = torch.arange(1, 10).expand(2, -1)
    causal = {"doc_start": torch.zeros_like(kv_end), "kv_end": kv_end}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(input_ids=tokens, **causal).logits[:, -1]
        first = {name: ends[:, :8] for name, ends in causal.items()}
        model(input_ids=tokens[:, :8], **first, past_key_values=cache)
        decoded = model(input_ids=tokens[:, 8:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("kv_end"), "samples of 128 tokens without doc_start and kv_end"),
        (lambda batch: (batch.pop("kv_end"), batch.pop("doc_start")), "documents would see each other"),
        (lambda batch: batch.update(doc_start=batch["doc_start"][:, :64]), r"\[2, 64\].*expected \[2, 128\]"),
        (lambda batch: batch.update(attention_mask=torch.zeros(2, 128)), "attention_mask that hides tokens"),
        (lambda batch: batch.update(attention_mask=torch.ones(2, 1, 128, 128)), "attention_mask that hides"),
        (lambda batch: batch.pop("input_ids"), "without input_ids or inputs_embeds"),
    ],
)
def test_calls_that_would_run_under_another_mask_are_refused(change, message):
    model = attach(tiny_model())
    batch = batch_of()
    batch.pop("labels")
    change(batch)
    with pytest.raises(UsageError, match=message):
        model(**batch)


def test_positional_arguments():
    model = attach(tiny_model())
    batch = batch_of()
    by_name = model(**batch).logits
    torch.testing.assert_close(model(batch.pop("input_ids"), **batch).logits, by_name)
    with pytest.raises(UsageError, match="several positional"):
        model(torch.ones(1, 1, dtype=torch.long), None)


def test_an_all_ones_padding_mask_is_accepted():
    model = attach(tiny_model())
    batch = batch_of()
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, attention_mask=torch.ones(2, 128)).logits, expected)


def test_inner_models_and_static_caches_are_refused():
    model = attach(tiny_model())
    with pytest.raises(UnsupportedModelError, match="a part of the attached model was called"):
        model.model(input_ids=torch.ones(1, 3, dtype=torch.long))
    static = StaticCache(config=model.config, max_cache_len=16)
    kv_end = torch.full((1, 4), 4)
    with pytest.raises(UnsupportedModelError, match="Turn off static caches"):
        model(
            input_ids=torch.ones(1, 4, dtype=torch.long),
            doc_start=torch.zeros_like(kv_end),
            kv_end=kv_end,
            past_key_values=static,
        )


def test_wrapped_and_empty_models_and_unknown_names_are_refused():
    with pytest.raises(UnsupportedModelError, match="Attach the model first and wrap it afterwards"):
        attach(torch.nn.DataParallel(tiny_model()))
    with pytest.raises(UnsupportedModelError, match="no weights yet"):
        attach(tiny_model().to("meta"))
    with pytest.raises(UsageError, match="backend is 'magic'"):
        attach(tiny_model(), backend="magic")
    with pytest.raises(UsageError, match="mask is 'full'"):
        attach(tiny_model(), mask="full")


def broken(mask=None, attend=None):
    """The backend sdpa with one part replaced by a wrong one."""
    real = BACKENDS["sdpa"]
    prepare = real.prepare if mask is None else lambda intervals: PerWindow(intervals, mask)
    return dataclasses.replace(real, prepare=prepare, compute=attend or real.compute)


def causal_only(intervals):
    return dense_mask(intervals) & torch.ones(intervals.keys, intervals.keys, dtype=torch.bool).tril()


def no_documents(intervals):
    return dense_mask(dataclasses.replace(intervals, doc_start=torch.zeros_like(intervals.doc_start)))


def everything(intervals):
    return torch.ones_like(dense_mask(intervals))


def wrong_scale(call):
    return dense_attention(call._replace(scaling=2.0))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (broken(causal_only), "does not look at the context block ahead"),
        (broken(no_documents), "other logits when attached"),
        (broken(everything), "other logits when attached"),
        (broken(attend=wrong_scale), "other logits when attached"),
    ],
    ids=["causal-only", "no-documents", "everything", "wrong-scale"],
)
def test_the_canary_detects_a_wrong_mask(backend, reason, monkeypatch):
    monkeypatch.setitem(BACKENDS, "sdpa", dataclasses.replace(backend, name="ismdata_broken"))
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=reason):
        attach(model)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_the_canary_detects_a_layer_that_mixes_tokens():
    """The model leaks outside its attention, which only tokens after the first document show."""

    class Leaking(type(tiny_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.logits.shape[1] == 16 and output.logits.shape[0] > 1:  # packed rows only
                output.logits = output.logits + 0.1 * output.logits.roll(1, dims=1)
            return output

    with pytest.raises(UnsupportedModelError, match="must not see it"):
        attach(Leaking(tiny_model(dtype=torch.float32).config))


def test_attach_leaves_training_mode_and_random_state():
    model = tiny_model().train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    attach(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_detach_restores_the_stock_model():
    model = tiny_model()
    tokens = torch.arange(2, 12)[None]
    before = model(input_ids=tokens).logits
    stock_loss = model.loss_function
    attach(attach(model))
    detach(model)
    detach(model)
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=0)
    assert model.loss_function is stock_loss
    assert not model._forward_pre_hooks


def test_a_copy_is_attached_too_and_independent():
    model = attach(tiny_model())
    twin = copy.deepcopy(model)
    expected = model(**batch_of()).logits
    torch.testing.assert_close(twin(**batch_of()).logits, expected)
    attach(twin)
    torch.testing.assert_close(twin(**batch_of()).logits, expected)
    detach(twin)
    torch.testing.assert_close(model(**batch_of()).logits, expected)


def test_the_mask_is_saved_and_restored(tmp_path):
    model = attach(tiny_model(dtype=torch.float32), mask="ism")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["ismdata_mask"] == "ism"
    assert "attn_implementation" not in json.dumps(config)
    loaded = load(tmp_path / "model")
    torch.testing.assert_close(loaded(**batch_of()).logits, model(**batch_of()).logits)
    assert loaded.config.ismdata_mask == "ism"
    assert load(tmp_path / "model", mask="causal").config.ismdata_mask == "causal"


def test_loading_refuses_missing_files_and_an_unknown_mask(tmp_path):
    with pytest.raises(DataError, match=r"no config.json"):
        load(tmp_path)
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="records no ismdata_mask"):
        load(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"plain: no model could be loaded"):
        load(tmp_path / "plain", mask="ism")


@pytest.fixture
def lacking(monkeypatch):
    """A function that makes backends lack something, on a CUDA device that need not exist."""

    def lack(*names):
        for name, backend in list(BACKENDS.items()):
            reason = f"no {name} here" if name in names else None
            monkeypatch.setitem(BACKENDS, name, dataclasses.replace(backend, missing=lambda device, why=reason: why))

    return lack


@pytest.mark.parametrize(
    ("lacks", "chosen"),
    [((), "varlen"), (("varlen",), "flex"), (("varlen", "flex"), "sdpa")],
    ids=["all", "no-varlen", "sdpa-alone"],
)
def test_auto_takes_the_fastest_on_a_gpu_and_reports_it(lacks, chosen, lacking):
    lacking(*lacks)
    reporter = Recorder()
    assert choose("auto", torch.device("cuda"), reporter=reporter) == chosen
    assert reporter.notes == [f"attention backend: {chosen} on cuda"]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"dtype": torch.float32}, "flex"),
        ({"dtype": torch.float16}, "varlen"),
        ({"soft_caps": True}, "flex"),
    ],
    ids=["float32", "float16", "soft-caps"],
)
def test_auto_skips_backends_that_do_not_support_the_model(asked, chosen, lacking):
    lacking()
    assert choose("auto", torch.device("cuda"), **asked) == chosen


def test_auto_is_dense_on_a_cpu(lacking, monkeypatch, capsys):
    lacking()
    reporter = Recorder()
    assert attached_backend(attach(tiny_model(), reporter=reporter)) == "sdpa"
    assert reporter.notes == ["attention backend: sdpa on cpu"]
    assert choose("flex", torch.device("cpu"), reporter=reporter) == "flex"
    monkeypatch.setenv("RANK", "1")
    assert choose("auto", torch.device("cpu"), reporter=reporter) == "sdpa"
    assert len(reporter.notes) == 1
    assert capsys.readouterr().err == ""


def test_a_backend_that_cannot_run_names_what_is_missing(lacking):
    lacking("varlen")
    model = tiny_model()
    with pytest.raises(UsageError, match="varlen cannot run on cpu: no varlen here"):
        attach(model, backend="varlen")
    with pytest.raises(UsageError, match="not attached"):
        attached_backend(model)


def test_auto_depends_on_the_device_and_dtype_to_come(lacking):
    lacking()
    assert attached_backend(attach(tiny_model(), device="cuda")) == "flex"
    assert attached_backend(attach(tiny_model(), device="cuda", autocast=torch.bfloat16)) == "varlen"


def test_a_large_dense_mask_raises_a_warning():
    def prepared(rows, keys):
        ends = torch.zeros(2, rows, dtype=torch.int32)
        return BACKENDS["sdpa"].prepare(Intervals(doc_start=ends, kv_end=ends + 1, keys=keys))

    with pytest.warns(UserWarning, match=r"dense mask of 0\.50 GiB for 2 x 16384 tokens.*flex or varlen"):
        prepared(16384, 16384)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(8192, 8192)
        prepared(1, 100_000)


def test_registered_names_have_no_substring_that_transformers_looks_for():
    for backend in BACKENDS.values():
        assert not any(word in backend.name for word in ("flash", "sdpa", "flex_attention"))


def test_the_canary_covers_every_kind_of_pair():
    """Its sequence has rows that see ahead, rows that do not, a second document and padding."""
    doc_start, kv_end = masks.intervals(canary._SEQ_LENS, canary._SPANS, seq_len=canary._TOKENS, mask="ism")
    rows = np.arange(canary._TOKENS)
    assert (kv_end > rows + 1).any()
    assert (kv_end == rows + 1).any()
    assert set(doc_start) > {0, 8}
