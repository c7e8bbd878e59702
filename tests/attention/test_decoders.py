"""Every family of decoders under every backend against the stock model with a written-out mask; what is refused, why.

On a CPU flex has its forward pass alone.
"""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    BartConfig,
    BloomConfig,
    DeepseekV32Config,
    DogeConfig,
    DynamicCache,
    FalconH1Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    PhimoeConfig,
    Qwen3NextConfig,
    RobertaConfig,
    RwkvConfig,
    T5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ismdata.attention.attachment import attach, detach
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.supported_models import check_parallelism
from ismdata.data.collate import Collator
from ismdata.errors import UnsupportedModelError
from ismdata.generate.feeding import feed
from tests.support.decoders import CONFIGS, WINDOW, decoder, stock_forward
from tests.support.tiny import ANSWER, PROMPT, QUERY, SIZES, VOCABULARY, checkpoint_activations, sample

TRAINING_BACKENDS = [name for name, each in BACKENDS.items() if each.missing_for_training(torch.device("cpu")) is None]

#: Contexts and answers longer and shorter than the sliding window, two documents per row, and padding.
DOCUMENTS = [
    [(PROMPT, 2), (QUERY, 13), (ANSWER, 14), (QUERY, 12), (ANSWER, 3)],
    [(QUERY, 16), (ANSWER, 5), (QUERY, 1), (ANSWER, 21)],
]


_MODELS = {}


def attached(name, backend):
    """One float64 model per family and backend: attaching is deterministic, and no test here changes weights."""
    if (name, backend) not in _MODELS:
        _MODELS[name, backend] = attach(decoder(name), backend=backend)
    return _MODELS[name, backend]


def batch_of(mask="ism"):
    return Collator()([sample(DOCUMENTS, mask=mask, seed=seed) for seed in (0, 1)])


def loss_gradients(model, logits, labels):
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_the_stock_model_under_an_explicit_mask(name, backend):
    model = attached(name, backend)
    for mask in ("ism", "prefix"):
        batch = batch_of(mask)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        oracle, expected = stock_forward(model, batch)
        # Stock eager attention computes its softmax in float32, and the models' norms compute in float32.
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        if backend in TRAINING_BACKENDS:
            found = loss_gradients(model, logits, labels)
            for parameter, gradient in loss_gradients(oracle, expected, labels).items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_causal_intervals_equal_the_stock_model(name, backend):
    """One document that fills the row, far longer than the windows: positions, windows and scores are the model's."""
    row = sample([[(QUERY, 60), (ANSWER, 68)]], mask="causal")
    tokens = torch.from_numpy(row.sequence.input_ids)[None].long()
    with torch.no_grad():
        expected = decoder(name)(input_ids=tokens, use_cache=False).logits
        batch = Collator()([row])
        batch.pop("labels")
        logits = attached(name, backend)(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_the_window_changes_the_logits():
    """The two tests above can fail: one key more in the window gives other logits."""
    batch = batch_of()
    batch.pop("labels")
    narrow = attach(decoder("mistral"))
    wide = attach(decoder("mistral", sliding_window=WINDOW + 1))
    assert (narrow(**batch).logits - wide(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_nothing(name, backend):
    def gradients(checkpointing):
        model = attach(decoder(name, dtype=torch.float32), backend=backend).train()
        if checkpointing:
            checkpoint_activations(model)
        batch = batch_of()
        labels = batch.pop("labels")
        return loss_gradients(model, model(**batch).logits, labels)

    plain = gradients(False)
    for parameter, gradient in gradients(True).items():
        torch.testing.assert_close(gradient, plain[parameter])


@pytest.mark.slow
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_a_compiled_model_gives_the_same(backend):
    """torch.compile traces forward and backward; compiling inductor's kernels too would take minutes."""
    model = attach(decoder("llama"), backend=backend)
    batch = batch_of()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    plain = loss_gradients(model, logits, labels)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")(**batch).logits
    torch.testing.assert_close(compiled, logits, rtol=0, atol=1e-9)
    for parameter, gradient in loss_gradients(model, compiled, labels).items():
        torch.testing.assert_close(gradient, plain[parameter], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_with_windows_gives_the_full_forward(name, backend):
    """Law 3 for sliding layers, whose caches keep no more than the window: turn by turn as chat feeds them."""
    model = attached(name, backend)
    turns = [(QUERY, 17), (ANSWER, 4), (QUERY, 5), (ANSWER, 12), (QUERY, 14), (ANSWER, 3)]
    row = sample([turns])
    batch = Collator()([row])
    batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch).logits[0]
    cache, at, tokens = DynamicCache(config=model.config), 0, row.sequence.input_ids.tolist()
    for kind, length in turns:
        if kind == QUERY:
            logits = feed(model, tokens[at : at + length], cache, bidirectional=True)
            torch.testing.assert_close(logits, expected[at + length - 1], rtol=0, atol=1e-9)
        else:
            for place in range(at, at + length):
                logits = feed(model, [tokens[place]], cache, bidirectional=False)
                torch.testing.assert_close(logits, expected[place], rtol=0, atol=1e-9)
        at += length


@pytest.mark.slow
def test_soft_caps_with_flex_only():
    model = decoder("gemma2")
    batch = batch_of()
    batch.pop("labels")
    expected = stock_forward(model, batch)[1]
    for backend in BACKENDS:
        if backend == "flex":
            torch.testing.assert_close(attach(model, backend=backend)(**batch).logits, expected, rtol=0, atol=1e-5)
        else:
            with pytest.raises(UnsupportedModelError, match=r"softcap \(soft-capped.*Use the backend flex"):
                attach(model, backend=backend)
    tokens = batch["input_ids"][0, :15].tolist()
    attach(model, backend="flex")
    cached = feed(model, tokens, DynamicCache(config=model.config), bidirectional=True)
    torch.testing.assert_close(cached, expected[0, 14], rtol=0, atol=1e-5)


def test_a_window_of_all_positions_is_none():
    """Phi-3.5-MoE has such a one."""
    sizes = {**SIZES, "num_local_experts": 2, "sliding_window": 256, "max_position_embeddings": 256}
    attach(AutoModelForCausalLM.from_config(PhimoeConfig(**sizes)))


@pytest.mark.slow
def test_soft_caps_under_a_stock_attention_without_them(monkeypatch):
    """transformers up to 5.20 runs Gemma 2 under sdpa, which ignores soft caps: `attach` compares with eager."""

    def without_caps(*args, softcap=None, **options):
        return sdpa_attention_forward(*args, **options)

    AttentionInterface.register("no_caps", without_caps)
    model = decoder("gemma2")
    model.set_attn_implementation("no_caps")
    attach(model, backend="flex")
    detach(model)
    assert model.config._attn_implementation == "no_caps"
    with pytest.raises(UnsupportedModelError, match=r"softcap \(soft-capped.*Use the backend flex"):
        attach(model, backend="sdpa")


MIXED = ["linear_attention", "full_attention"]
MOE = {"num_experts": 2, "num_experts_per_tok": 1}
UNSUPPORTED = {
    "linear attention": (
        lambda: Qwen3NextConfig(**SIZES, **MOE, head_dim=8, moe_intermediate_size=16, layer_types=MIXED),
        "layers of kind linear_attention, which carry a state from token to token",
    ),
    "mamba among attention": (
        lambda: JambaConfig(**SIZES, **MOE, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4),
        r"layers of kind [\w, ]+, which carry a state",
    ),
    "mamba 2 among attention": (
        lambda: BambaConfig(
            **SIZES, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
        ),
        r"layers of kind [\w, ]+, which carry a state",
    ),
    "mamba beside attention": (
        lambda: FalconH1Config(
            **SIZES, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_d_ssm=32, mamba_n_groups=1
        ),
        "which compute a convolution or a state beside their attention|would ignore the mask",
    ),
    "mamba alone": (
        lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
        "which carry a state|would ignore the mask",
    ),
    "recurrence": (
        lambda: RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
        "which carry a state|would ignore the mask",
    ),
    "short convolutions": (
        lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
        "layers of kind conv, whose convolution mixes documents",
    ),
    "chunks": (
        lambda: Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=48),
        "layers of kind chunked_attention, whose chunks",
    ),
    "sinks": (
        lambda: GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, layer_types=["full_attention"] * 2),
        r"requires s_aux \(attention sinks\)",
    ),
    "a window in its masks only": (
        lambda: PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=WINDOW, max_position_embeddings=256),
        f"has a sliding window of {WINDOW} tokens, which its layers do not pass",
    ),
    "queries scaled by their place": (
        lambda: Llama4TextConfig(
            **SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, layer_types=["full_attention"] * 2
        ),
        "scales its queries by their place in the row",
    ),
    "keys chosen by scores": (
        lambda: DeepseekV32Config(**SIZES | {"num_key_value_heads": 4}, n_routed_experts=2, n_group=1, topk_group=1),
        "layers of kind indexed_attention, which choose or merge keys by scores of their own",
    ),
    "a mask of its own, which begins as zeros": (
        lambda: DogeConfig(**SIZES),
        "DogeAttention gives its attention a mask or a bias of its own",
    ),
    "positions from the padding token on": (
        lambda: RobertaConfig(**SIZES, is_decoder=True, type_vocab_size=1),
        "other logits with position_ids 0, 1, 2 … than without",
    ),
    "an attention of its own": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "would ignore the mask",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_models_are_refused_with_the_reason_and_left_unchanged(case):
    config, reason = UNSUPPORTED[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).eval()
    tokens = torch.arange(2, 12)[None]
    before = model(input_ids=tokens, use_cache=False).logits
    for backend in BACKENDS:
        with pytest.raises(UnsupportedModelError, match=reason):
            attach(model, backend=backend)
    torch.testing.assert_close(model(input_ids=tokens, use_cache=False).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64),
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
    ],
    ids=["t5", "bart"],
)
def test_encoder_decoders_are_refused(config):
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        attach(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("kind", ["CP", "SP"])
def test_parallelism_that_splits_sequences_is_refused(kind, monkeypatch):
    model = decoder("llama")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
    with pytest.raises(UnsupportedModelError, match="context or sequence parallelism over 2 devices"):
        attach(model)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
    attach(model)


def test_parallelism_set_in_python_is_refused(monkeypatch):
    class Parallelism:
        cp_size, sp_size = 4, 1

    monkeypatch.setattr(AcceleratorState, "_shared_state", {"parallelism_config": Parallelism()})
    with pytest.raises(UnsupportedModelError, match="over 4 devices"):
        check_parallelism()
