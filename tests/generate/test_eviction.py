"""Compare the choice of entries with brute force, and rotated keys with the keys that the model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, LlamaConfig, Qwen3Config

from ismdata.attention.attachment import attach
from ismdata.errors import UnsupportedModelError
from ismdata.generate.eviction import POLICIES, KeyRotation, crop_entries, keep_entries, select_entries
from ismdata.generate.feeding import feed, feed_scored
from tests.support.talks import FEW
from tests.support.tiny import SIZES, VOCABULARY, tiny_model

IDS = list(range(2, 42))


def brute_force(entropies, count, *, recent, sinks):
    """The entries that SirLLM keeps, one by one: sinks, then recent tokens from the end, then the best of the rest."""
    size = len(entropies)
    stay = set(range(min(sinks, count, size)))
    for at in reversed(range(size)):
        if len(stay) < count and size - at <= recent:
            stay.add(at)
    while len(stay) < min(count, size):
        stay.add(max(set(range(size)) - stay, key=lambda at: (entropies[at], at)))
    return sorted(stay)


@FEW
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.25]), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(0, 30),
    st.integers(0, 5),
    st.sampled_from(sorted(POLICIES)),
)
def test_selected_entries(entropies, count, recent, sinks, policy):
    values = np.array(entropies)
    stay = select_entries(
        policy, values, count, recent=recent, sinks=sinks, generator=np.random.default_rng(0)
    ).tolist()
    assert stay == sorted(set(stay))
    assert len(stay) == min(count, len(entropies))
    always = set(brute_force(entropies, min(count, sinks + recent), recent=recent, sinks=sinks))
    assert always <= set(stay)  # sinks and recent tokens, whatever the policy
    if policy == "sirllm":
        assert stay == brute_force(entropies, count, recent=recent, sinks=sinks)
    if policy == "streaming":
        assert stay == brute_force(list(range(len(entropies))), count, recent=recent, sinks=sinks)


def test_the_policies_differ_in_the_middle():
    entropies = np.array([9, 9, 1, 8, 2, 7, 3, 6, 4, 5.0])

    def stay(policy):
        return select_entries(policy, entropies, 6, recent=1, sinks=2, generator=np.random.default_rng(1)).tolist()

    assert stay("sirllm") == [0, 1, 3, 5, 7, 9]
    assert stay("streaming") == [0, 1, 6, 7, 8, 9]
    assert stay("interval") == [0, 1, 2, 4, 6, 9]
    assert stay("random") == stay("random")
    assert stay("random")[:2] == [0, 1]


def one_layer(kind, **options):
    torch.manual_seed(3)
    sizes = SIZES | {"num_hidden_layers": 1} | options
    config = LlamaConfig(**sizes) if kind == "llama" else Qwen3Config(**sizes, head_dim=8)
    return attach(AutoModelForCausalLM.from_config(config).to(torch.float32).eval())


STATIC = {
    "default": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("scaling", STATIC)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_cache_after_eviction_equals_a_cache_of_the_remaining_tokens(kind, scaling):
    """In a model of one layer keys and values depend only on token and position, not on evicted tokens."""
    model = one_layer(kind, **STATIC[scaling])
    rotation = KeyRotation.of(model)
    cache = DynamicCache(config=model.config)
    feed(model, IDS, cache, bidirectional=False)
    stay = np.array([0, 1, 2, 3, 9, 17, 18, 30, 38, 39])
    keep_entries(cache, stay, rotation)
    stay_again = np.array([0, 1, 4, 5, 6, 8, 9])  # a second eviction
    keep_entries(cache, stay_again, rotation)
    left = [IDS[at] for at in stay[stay_again]]
    assert cache.get_seq_length() == len(left)
    fresh = DynamicCache(config=model.config)
    feed(model, left, fresh, bidirectional=False)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)
    for _ in range(3):
        ours = feed(model, [50, 51], cache, bidirectional=False)
        theirs = feed(model, [50, 51], fresh, bidirectional=False)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_rotated_keys_equal_computed_keys_in_every_layer(architecture):
    """A shift of all positions by the same distance changes only the rotation of the keys."""
    model = attach(tiny_model(architecture, dtype=torch.float32))
    if architecture == "gemma3":  # it has one rotary embedding per kind of layer
        with pytest.raises(UnsupportedModelError, match=r"no single rotary embedding|expected a tensor"):
            KeyRotation.of(model)
        return
    rotation = KeyRotation.of(model)

    def keys(start):
        cache, count = DynamicCache(config=model.config), 12
        ends = torch.arange(1, count + 1, dtype=torch.int32)[None]
        with torch.no_grad():
            model(
                input_ids=torch.tensor([IDS[:count]]),
                position_ids=torch.arange(start, start + count)[None],
                doc_start=torch.zeros_like(ends),
                kv_end=ends,
                past_key_values=cache,
                use_cache=True,
            )
        return [layer.keys for layer in cache.layers]

    old, new = torch.arange(700, 712), torch.arange(12)
    for moved, expected in zip(keys(700), keys(0), strict=True):
        assert (moved - expected).abs().max() > 0.1
        torch.testing.assert_close(rotation.rotate(moved, old, new), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (
            LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            r"only a part of each head \(0.5\)",
        ),
        (
            GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
            "part of each head",
        ),
    ],
    ids=["dynamic", "partial", "gpt-neox"],
)
def test_models_whose_keys_cannot_be_rotated_are_refused(config, reason):
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UnsupportedModelError, match=reason):
        KeyRotation.of(model)


def test_a_model_that_rotates_other_pairs_is_refused(monkeypatch):
    """Its angles look like Llama's, but it rotates pairs of neighbouring dimensions."""

    def rotate_neighbours(query, key, cos, sin):
        cos, sin = (each[..., : each.shape[-1] // 2].repeat_interleave(2, -1)[:, None] for each in (cos, sin))

        def rotated(x):
            return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin

        return rotated(query), rotated(key)

    model = one_layer("llama")
    KeyRotation.of(model)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", rotate_neighbours)
    with pytest.raises(UnsupportedModelError, match="differ from the keys that it computes at the new positions"):
        KeyRotation.of(model)


def test_cropping_restores_the_earlier_cache():
    model = attach(tiny_model())
    cache = DynamicCache(config=model.config)
    feed(model, IDS[:9], cache, bidirectional=True)
    before = [layer.keys.clone() for layer in cache.layers]
    feed(model, IDS[9:], cache, bidirectional=True)
    crop_entries(cache, 9)
    assert cache.get_seq_length() == 9
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("count", [1, 2, 256, 300])
def test_entropies_equal_those_of_one_forward(count):
    """Whether the tokens are fed at once or in two parts."""
    model = attach(tiny_model())
    ids = [(7 * k) % (VOCABULARY - 2) + 2 for k in range(count)]
    with torch.no_grad():
        ends = torch.arange(1, count + 1, dtype=torch.int32)[None]
        logits = model(input_ids=torch.tensor([ids]), doc_start=torch.zeros_like(ends), kv_end=ends).logits[0]
    probabilities = logits.softmax(-1)
    expected = [-float(probabilities[k - 1, ids[k]].log()) for k in range(1, count)]
    last, entropies = feed_scored(model, ids, DynamicCache(config=model.config), None)
    assert entropies[0] == 0
    np.testing.assert_allclose(entropies[1:], expected, atol=1e-5)
    torch.testing.assert_close(last, logits[-1], rtol=0, atol=1e-9)
    cache = DynamicCache(config=model.config)
    middle, first = feed_scored(model, ids[: count // 2 or 1], cache, None)
    if count > 1:
        _, second = feed_scored(model, ids[count // 2 :], cache, middle)
        np.testing.assert_allclose(first + second, entropies, atol=1e-5)
