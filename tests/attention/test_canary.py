"""The canary at the start of training: what it accepts, what it detects, what it leaves unchanged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from ismdata.attention import canary
from ismdata.attention.attachment import attach
from ismdata.attention.backends.base import PerWindow
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.backends.sdpa import dense_attention, dense_mask
from ismdata.attention.canary import check_training
from ismdata.errors import UnsupportedModelError, UsageError
from tests.support.decoders import CONFIGS, decoder
from tests.support.tiny import ANSWER, QUERY, sample, tiny_model, write_packed
from tests.support.training_shards import run, word_tokenizer

TRAINING_BACKENDS = [name for name, each in BACKENDS.items() if each.missing_for_training(torch.device("cpu")) is None]


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_decoder_passes(name, backend):
    check_training(attach(decoder(name, dtype=torch.float32), backend=backend))


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_in_half_precision_too(backend):
    check_training(attach(decoder("gemma3", dtype=torch.bfloat16), backend=backend))
    check_training(attach(decoder("qwen3", dtype=torch.float32), backend=backend), autocast=torch.bfloat16)


def test_flex_cannot_train_on_a_cpu():
    with pytest.raises(UsageError, match=r"the backend flex cannot train on cpu.*no backward pass.*the backend sdpa"):
        check_training(attach(tiny_model(), backend="flex"))


def test_a_model_that_was_not_attached():
    with pytest.raises(UsageError, match=r"no attached model inside\. Call ismdata\.attach"):
        check_training(tiny_model())


def test_the_attached_model_inside_a_wrapper_is_found():
    check_training(torch.nn.Sequential(attach(tiny_model())))


def one_key_more(intervals):
    """The last row of each sample sees one key too many, the first one."""
    mask = dense_mask(intervals)
    mask[:, :, -1, 0] = True
    return mask


def without(name):
    """Dense attention through which no gradient of the queries, keys or values flows."""

    return lambda call: dense_attention(call._replace(**{name: getattr(call, name).detach()}))


def scaled_gradient(call):
    """The right output, with gradients of the keys that are an eighth too large."""
    return dense_attention(call._replace(key=call.key + (call.key - call.key.detach()) / 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prepare": lambda intervals: PerWindow(intervals, one_key_more)}, "its output differs"),
        ({"compute": without("query")}, "its gradient of the queries differs"),
        ({"compute": without("key")}, "its gradient of the keys differs"),
        ({"compute": without("value")}, "its gradient of the values differs"),
        ({"compute": scaled_gradient}, "its gradient of the keys differs"),
    ],
    ids=["one-key-more", "no-queries", "no-keys", "no-values", "scaled"],
)
def test_it_detects_a_wrong_backend(change, reason, monkeypatch):
    """The backend is replaced after `attach`, whose canary therefore did not see it."""
    model = attach(tiny_model(dtype=torch.float32))
    wrong = dataclasses.replace(BACKENDS["sdpa"], **change)
    monkeypatch.setitem(BACKENDS, "sdpa", wrong)
    if "prepare" in change:
        (hook,) = model._forward_pre_hooks.values()
        model._forward_pre_hooks.clear()
        model.register_forward_pre_hook(type(hook)(hook.func, wrong), with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match=f"LlamaAttention .layer 0.: under the backend sdpa {reason}"):
        check_training(model)


def test_it_detects_a_layer_that_calls_twice_or_never():
    class Twice(type(tiny_model())):
        again = False

        def forward(self, *args, **kwargs):
            if self.again:
                super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs)

    model = attach(Twice(tiny_model(dtype=torch.float32).config))
    check_training(model)
    model.again = True
    with pytest.raises(
        UnsupportedModelError,
        match="has 2 layers, and 2 called the attention function, 4 times in all; expected 2 times",
    ):
        check_training(model)
    model.again = False
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="has 3 layers, and 2 called"):
        check_training(model)


def test_it_detects_a_layer_that_does_not_pass_its_window(monkeypatch):
    model = attach(decoder("gemma3", dtype=torch.float32))
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(UnsupportedModelError, match="has 1 sliding layers, of which 0 pass"):
        check_training(model)


def test_attach_refuses_a_layer_that_passes_an_unknown_option(monkeypatch):
    """Whatever it means, and whether or not it changes anything yet."""
    stock = modeling_llama.LlamaAttention.forward

    def with_option(self, *args, **kwargs):
        return stock(self, *args, **kwargs, relative_bias=torch.zeros(1))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", with_option)
    with pytest.raises(UnsupportedModelError, match="LlamaAttention passes relative_bias to its attention function"):
        attach(tiny_model())
    monkeypatch.undo()
    attach(tiny_model())


def test_it_detects_a_model_that_mixes_tokens():
    class Leaking(type(tiny_model())):
        leaks = False

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if self.leaks:
                output.logits = output.logits + 0.1 * output.logits.roll(-1, dims=1)
            return output

    model = attach(Leaking(tiny_model(dtype=torch.float32).config))
    model.leaks = True
    with pytest.raises(UnsupportedModelError, match="does not follow the mask under the backend sdpa"):
        check_training(model)


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_it_leaves_model_and_random_state_unchanged(backend):
    model = attach(tiny_model(dtype=torch.float32), backend=backend).train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check_training(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert AttentionInterface()[BACKENDS[backend].name] == BACKENDS[backend].attention


def test_one_key_too_many_exceeds_the_tolerance_of_half_precision():
    """The mean of 100 random values against the mean of 101, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(101, 64, generator=generator)
    error = canary._row_error(values.mean(0, keepdim=True), values[:100].mean(0, keepdim=True))
    assert error > canary._EPS * torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Four rows and a tokenizer of one word per token."""
    documents = [[(QUERY, 20), (ANSWER, 30)], [(QUERY, 9), (ANSWER, 40)]]
    folder = write_packed(
        tmp_path_factory.mktemp("data") / "packed", [sample(documents, seed=seed) for seed in range(4)]
    )
    word_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.slow
def test_training_is_the_same_under_each_backend(packed, tmp_path):
    reports = [
        run(packed, tmp_path / name, model="tiny", backend=name, steps=3) for name in ("auto", *TRAINING_BACKENDS)
    ]
    assert [report.backend for report in reports] == ["sdpa", *TRAINING_BACKENDS]
    for report in reports[1:]:
        assert report.last_loss == pytest.approx(reports[0].last_loss, abs=1e-5)


def test_a_run_that_the_canary_stops_writes_nothing(packed, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="the backend flex cannot train on cpu"):
        run(packed, tmp_path / "model", model="tiny", backend="flex")
    monkeypatch.setattr(canary, "_EPS", 0)
    monkeypatch.setattr(canary, "_LEAST", 0)
    with pytest.raises(UnsupportedModelError, match="differs from the reference by"):
        run(packed, tmp_path / "model", model="tiny")
    assert not list(tmp_path.iterdir())
