"""Sessions with models whose own caches evict keys: what remains after an undo answers as a fresh conversation."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    MoshiConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    cache_utils,
)

from ismdata.attention.attachment import attach
from ismdata.errors import DataError, UnsupportedModelError, UsageError
from ismdata.generate.eviction import KeyRotation, crop_entries, keep_entries
from ismdata.generate.feeding import feed
from ismdata.generate.model_facts import resolve_mask
from ismdata.generate.session import Session
from ismdata.generate.whole_cache import whole_cache
from ismdata.generate.window import Window
from tests.laws.test_laws_cache import TextEncoder, one_forward
from tests.support.decoders import WINDOW, decoder
from tests.support.tiny import SIZES

#: Families whose config names a window that their attention does not apply.
NOT_APPLIED = {
    "moshi": lambda: MoshiConfig(**SIZES, sliding_window=WINDOW, head_dim=8, ffn_dim=48, audio_vocab_size=8),
    "phimoe": lambda: PhimoeConfig(**SIZES, sliding_window=WINDOW, num_local_experts=4),
}
FAMILIES = ["mistral", "qwen2", "gemma3", "phi3", *NOT_APPLIED]


def family(name):
    if name not in NOT_APPLIED:
        return attach(decoder(name))
    torch.manual_seed(0)
    # The grouped products of experts do not take float64.
    options = {"experts_implementation": "eager"} if name == "phimoe" else {}
    model = AutoModelForCausalLM.from_config(NOT_APPLIED[name](), **options).to(torch.float64).eval()
    try:
        return attach(model)
    except UnsupportedModelError as error:
        pytest.skip(f"this release of transformers: {error}")


def generated(session):
    return list(session._transcript.generated.values())


@pytest.mark.parametrize(
    ("name", "mask"), [*((each, "ism") for each in FAMILIES), ("mistral", "causal"), ("gemma3", "prefix")]
)
def test_undo_leaves_what_a_fresh_conversation_has(name, mask):
    """Undo below, at and above the window; the next answers are those of a conversation that never had the turn."""
    model = family(name)
    made = random.Random(name + mask)
    session = Session(model, TextEncoder(), mask=mask, max_new_tokens=5)
    asked = []
    for _ in range(14):
        if asked and made.random() < 0.4:
            session.undo()
            asked.pop()
        asked.append(str(made.random()))
        session.reply(asked[-1])
    fresh = Session(model, TextEncoder(), mask=mask, max_new_tokens=5)
    for text in asked:
        fresh.reply(text)
    assert len(session.fed) > 3 * WINDOW
    assert session.fed == fresh.fed
    assert generated(session) == generated(fresh)
    for ours, theirs in zip(session._cache.cache.layers, fresh._cache.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "mask"), [*((each, "ism") for each in FAMILIES), ("gemma3", "causal")])
def test_answers_are_those_of_one_forward(name, mask):
    """Law 3 beyond the window, after an undo."""
    model = family(name)
    session = Session(model, TextEncoder(), mask=mask, max_new_tokens=5)
    seen = []
    choose = session._choose
    session._choose = lambda logits, ids: seen.append(logits) or choose(logits, ids)
    ends = [0]
    for text in ("one", "two", "undone", "three", "four"):
        session.reply(text)
        if text == "undone":
            session.undo()
        else:
            ends.append(len(session.fed))
            seen = seen if text == "four" else []
    questions = [session.encoder.context(text) for text in ("one", "two", "three", "four")]
    turns = [(len(ids), end - start - len(ids)) for ids, (start, end) in zip(questions, pairwise(ends), strict=True)]
    expected = one_forward(model, turns, session.fed, mask)
    first = len(session.fed) - turns[-1][1] - 1
    last = torch.stack(seen[-min(5, turns[-1][1]) :])
    torch.testing.assert_close(last, expected[first : first + len(last)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_turns_leave_what_a_fresh_conversation_has(name):
    model = family(name)
    window = Window(when_full="drop-oldest", context=40)
    session = Session(model, TextEncoder(), mask="ism", max_new_tokens=5, window=window)
    texts = [f"question {number}" for number in range(9)]
    for text in texts:
        session.reply(text)
    assert session.left_out > 2
    fresh = Session(model, TextEncoder(), mask="ism", max_new_tokens=5)
    kept = session._transcript
    shifted = {index - session.left_out: ids for index, ids in kept.generated.items() if index >= session.left_out}
    shifted.pop(len(session.messages) - 1 - session.left_out)
    fresh._transcript = type(kept)(messages=session.messages[session.left_out : -2], generated=shifted)
    fresh.reply(texts[-1])
    assert session.fed == fresh.fed


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((each, "sirllm") for each in FAMILIES), *(("mistral", each) for each in ("streaming", "random", "interval"))],
)
def test_single_tokens_are_evicted_or_the_session_refuses_at_its_start(name, policy):
    model = family(name).float()
    options = {"mask": "ism", "max_new_tokens": 5, "window": Window(when_full=policy, context=24)}
    if name not in ("mistral", "qwen2", "phi3"):
        with pytest.raises(UnsupportedModelError, match=r"evicting single tokens needs keys.*drop-oldest"):
            Session(model, TextEncoder(), **options)
        return
    session = Session(model, TextEncoder(), **options)
    for number in range(9):
        session.reply(str(number))
    assert session._cache.evictions > 2
    assert len(session.fed) <= 24
    session.undo()
    session.reply("again")


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_evicted_entries_under_a_sliding_window(name):
    """In a model of one layer the remaining entries are those of the remaining tokens fed anew, the window included."""
    torch.manual_seed(3)
    sizes = SIZES | {"num_hidden_layers": 1}
    qwen = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
    config = MistralConfig(**sizes, sliding_window=WINDOW) if name == "mistral" else Qwen2Config(**sizes, **qwen)
    model = attach(AutoModelForCausalLM.from_config(config).float().eval())
    ids = list(range(2, 42))
    cache = whole_cache(model)
    feed(model, ids, cache, bidirectional=False)
    stay = np.array([0, 1, 2, 3, 9, 17, 18, 30, 34, 35, 36, 37, 38, 39])
    keep_entries(cache, stay, KeyRotation.of(model))
    fresh = whole_cache(model)
    feed(model, [ids[at] for at in stay], fresh, bidirectional=False)
    for tokens in ([50, 51], [7], [8, 9, 10]):
        ours, theirs = (feed(model, tokens, each, bidirectional=True) for each in (cache, fresh))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_cache_gives_the_logits_of_the_models_own(name):
    """Where the model's own cache works: before the window is full, and beyond it if the attention applies it."""
    model = family(name)
    ids = list(range(2, 42))
    own, whole = DynamicCache(config=model.config), whole_cache(model)
    length = WINDOW - 3 if name in NOT_APPLIED else 15
    for start in (0, length):
        part = ids[start : start + length] if name not in NOT_APPLIED or not start else ids[start : start + 1]
        for bidirectional in (True, False):
            if name in NOT_APPLIED and own.get_seq_length() + len(part) >= WINDOW:
                break
            ours, theirs = (feed(model, part, cache, bidirectional=bidirectional) for cache in (whole, own))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    before = whole.get_seq_length()
    feed(model, ids, whole, bidirectional=True)
    crop_entries(whole, before)
    assert whole.get_seq_length() == before
    assert {layer.keys.shape[-2] for layer in whole.layers} == {before}


def test_a_rotary_embedding_of_complex_numbers():
    """DeepSeek-V2's. A session without eviction works."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = SIZES | latent | {"num_key_value_heads": 4, "first_k_dense_replace": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV2Config(**sizes))
    attach(model.eval(), mask="ism")
    with pytest.raises(UnsupportedModelError, match=r"gives complex numbers; expected cosines.*Use --when-full stop"):
        Session(model, TextEncoder(), window=Window(when_full="sirllm", context=24))
    session = Session(model, TextEncoder(), max_new_tokens=5)
    session.reply("one")
    session.reply("undone")
    session.undo()
    session.reply("two")
    fresh = Session(model, TextEncoder(), max_new_tokens=5)
    fresh.reply("one")
    fresh.reply("two")
    assert session.fed == fresh.fed


def test_a_model_whose_text_part_is_attached():
    """The config of a model with several parts does not name the attention itself."""
    model = attach(decoder("llama"), mask="ism")
    parts = SimpleNamespace(get_text_config=lambda: model.config, ismdata_mask="ism")
    assert resolve_mask(SimpleNamespace(config=parts), None) == "ism"


def test_a_cache_that_holds_more_than_keys_is_refused(monkeypatch):
    """At the start of a session, with the layer and what its cache is."""
    model = attach(decoder("llama"))
    own = cache_utils.DynamicCache.__init__

    def with_a_state(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.layers[1:2] = [cache_utils.LinearAttentionLayer()]

    monkeypatch.setattr(cache_utils.DynamicCache, "__init__", with_a_state)
    with pytest.raises(
        UnsupportedModelError, match=r"the cache of layer 1 is a LinearAttentionLayer, which holds more"
    ):
        Session(model, TextEncoder(), mask="ism")


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    sizes = SIZES | {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    torch.manual_seed(0)
    config = Phi3Config(**sizes, rope_parameters=rope)
    return attach(AutoModelForCausalLM.from_config(config).to(torch.float64).eval())


def test_a_conversation_ends_where_the_rotary_angles_change():
    """Beyond, the keys in the cache are those of other angles: neither law 3 nor an undo would hold."""
    model = longrope()
    with pytest.raises(UsageError, match=r"--context is 33; expected at most 32: beyond, Phi3ForCausalLM .*longrope"):
        Session(model, TextEncoder(), mask="ism", window=Window(context=33))
    window = Window(when_full="drop-oldest")
    session = Session(model, TextEncoder(), mask="ism", max_new_tokens=5, window=window)
    assert session.context == 32
    for number in range(9):
        session.reply(f"question {number}")
        assert len(session.fed) <= 32
    assert session.left_out > 2
    crowded = Session(model, TextEncoder(), mask="ism", max_new_tokens=5)
    with pytest.raises(DataError, match=r"the model has 32 positions|the cache has 32 positions"):
        for number in range(9):
            crowded.reply(f"question {number}")


def test_the_angles_do_change():
    """The test above can fail: one forward and a cache agree up to the bound and not beyond."""
    model = longrope()
    for length, agrees in ((32, True), (40, False)):
        ids = [(7 * k) % 50 + 2 for k in range(length)]
        cache = whole_cache(model)
        feed(model, ids[:20], cache, bidirectional=False)
        ours = feed(model, ids[20:], cache, bidirectional=False)
        theirs = feed(model, ids, whole_cache(model), bidirectional=False)
        assert bool((ours - theirs).abs().max() < 1e-9) == agrees


def test_dynamic_angles_do_not_change_within_the_positions():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"max_position_embeddings": 48}), rope_parameters=rope)
    model = attach(AutoModelForCausalLM.from_config(config).to(torch.float64).eval())
    session = Session(model, TextEncoder(), mask="ism", max_new_tokens=5)
    assert session.context == 48
    ids = [(7 * k) % 50 + 2 for k in range(48)]
    cache = whole_cache(model)
    feed(model, ids[:20], cache, bidirectional=False)
    ours = feed(model, ids[20:], cache, bidirectional=False)
    torch.testing.assert_close(ours, feed(model, ids, whole_cache(model), bidirectional=False), rtol=0, atol=1e-9)
