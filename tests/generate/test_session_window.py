"""A full context: turns are dropped or single tokens evicted, and the model answers from the rest."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from ismdata.attention.attachment import attach
from ismdata.errors import DataError, UnsupportedModelError, UsageError
from ismdata.generate.eviction import SINKS, select_entries
from ismdata.generate.feeding import feed, feed_scored
from ismdata.generate.session import Session
from ismdata.generate.window import Window
from ismdata.rendering.glm_tokens import GlmTokens
from tests.laws.test_laws_cache import MASK_ID, START_ID, TextEncoder, glm_model, one_forward
from tests.support.scripted import END, AnewEncoder, CharacterEncoder, ScriptedModel
from tests.support.tiny import tiny_model


def dropping(script, *, context, mask="ism", encoder=None, **options):
    model = ScriptedModel(script)
    window = Window(when_full="drop-oldest", context=context)
    session = Session(model, encoder or CharacterEncoder(), mask=mask, window=window, max_new_tokens=3, **options)
    return session, model


def said(session):
    return [message["content"] for message in session.messages]


def test_the_oldest_turns_are_dropped_and_the_rest_is_fed_again():
    session, model = dropping([7, END, 0, 8, END, 0, 9, END, 0, 0, 0, 0, 0, 10, END], context=24, system="s")
    for text in ("abc", "de", "fg"):
        session.reply(text)
    assert (len(session.fed), session.left_out) == (19, 0)
    model.calls.clear()
    assert session.reply("h") == "k"  # 22 would leave room for 1 token, fewer than 3
    assert session.left_out == 2
    assert [(ids, past) for ids, past, _ in model.calls[:5]] == [
        ([80, 3, 4, 81], 0),
        ([8, END], 4),
        ([80, 5, 6, 81], 6),
        ([9, END], 10),
        ([80, 7, 81], 12),
    ]
    assert said(session) == ["s", "abc", "h", "de", "i", "fg", "j", "h", "k"]
    assert [len(message["content"]) for message in session.encoder.asked[-1]] == [1, 2, 1, 2, 1, 1]


def test_turns_are_dropped_repeatedly_and_undo_restores_them():
    made = random.Random(0)
    session, model = dropping([], context=40)
    for _ in range(12):
        model.script = [made.randrange(26) for _ in range(200)]
        session.reply("".join(made.choice("abcdef") for _ in range(made.randrange(1, 9))))
        assert len(session.fed) <= 40
        kept_messages = session.messages[session.left_out :]
        assert kept_messages[0]["role"] == "user"
        expected = [id for piece in CharacterEncoder().document(kept_messages) for id in piece.ids]
        assert session.fed == expected
    left_out = session.left_out
    assert left_out > 8
    while len(session.messages) > left_out:
        session.undo()
    assert session.left_out == 0
    model.script = [1, END] * 40
    session.reply("a")
    assert session.messages[session.left_out :][-2]["content"] == "a"
    assert len(session.fed) <= 40


def test_a_turn_that_does_not_fit_alone_is_refused():
    session, _ = dropping([7, END, 0], context=12)
    session.reply("ab")
    before = list(session.fed)
    with pytest.raises(DataError, match=r"would have 14 tokens before the answer; the cache has 12 posi.*Say less"):
        session.reply("abcdefghijkl")
    assert session.fed == before
    assert (said(session), session.left_out) == (["ab", "h"], 0)


@pytest.mark.parametrize(("mask", "encoder"), [("prefix", CharacterEncoder), ("causal", AnewEncoder)])
def test_turns_are_dropped_when_the_cache_is_not_kept(mask, encoder):
    session, model = dropping([7, END] * 60, context=22, mask=mask, encoder=encoder())
    for text in ("abc", "de", "fg", "h"):
        model.script = [7] * 50
        session.reply(text)
        assert len(session.fed) <= 22
    assert session.left_out > 0


@pytest.mark.parametrize("when_full", ["stop", "drop-oldest"])
@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_the_remaining_turns_have_the_logits_of_one_forward(when_full, mask):
    """With a real model and a context that some turns do not fit in."""
    model = attach(tiny_model(dtype=torch.float32))
    session = Session(model, TextEncoder(), mask=mask, max_new_tokens=5, window=Window(when_full=when_full, context=40))
    seen = []
    choose = session._choose
    session._choose = lambda logits, ids: seen.append(logits) or choose(logits, ids)
    made = random.Random(5)
    full = 0
    for _ in range(12):
        seen.clear()
        text = str(made.random())
        try:
            session.reply(text)
        except DataError:
            full += 1
            session.undo()
            continue
        questions = [m["content"] for m in session.messages[session.left_out :] if m["role"] == "user"]
        lengths = [len(session.encoder.context(question)) for question in questions]
        written = [ids for place, ids in sorted(session._transcript.generated.items()) if place >= session.left_out]
        turns = list(zip(lengths, map(len, written), strict=True))
        expected = one_forward(model, turns, session.fed, mask)
        first = len(session.fed) - turns[-1][1] - 1
        torch.testing.assert_close(torch.stack(seen), expected[first : first + len(seen)], rtol=0, atol=1e-5)
    assert (full > 1) == (when_full == "stop")
    assert (session.left_out > 1) == (when_full == "drop-oldest")


def reference_answer(model, states, contexts, *, size, policy, decay, count, turns):
    """SirLLM by its definition, with the cache rebuilt from the remaining tokens at each step: exact for one layer."""
    ids, entropies, turn, answers, before = [], [], 0, [], None

    def add(piece, new_turn):
        nonlocal ids, entropies, turn, before
        if len(ids) + len(piece) > size:
            recent = len(ids) - turn
            most = size - len(piece)
            most = min(most, max(size - max(len(piece), size // 16), min(SINKS + recent, most)))
            stay = select_entries(policy, np.array(entropies), most, recent=recent, generator=np.random.default_rng(0))
            ids, entropies = [ids[k] for k in stay], [entropies[k] for k in stay]
            turn = max(len(ids) - recent, 0)
        if new_turn:
            turn = len(ids)
        cache = DynamicCache(config=model.config)
        if ids:
            feed(model, ids, cache, bidirectional=False)
        # A token is scored by the logits from before the eviction, on which the model would have chosen it.
        before, scores = feed_scored(model, piece, cache, before)
        ids, entropies = ids + list(piece), entropies + scores
        return before

    for number in range(turns):
        logits, answer = add(contexts[number], True), []
        while len(answer) < count:
            answer.append(int(logits.argmax()))
            logits = add(answer[-1:], False)
            if answer[-1] == 60:
                break
        if answer[-1] != 60:
            add([60], False)
        entropies = [entropy * decay for entropy in entropies]
        answers.append(list(answer))
        states.append((list(ids), list(entropies)))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("policy", ["sirllm", "streaming", "interval"])
def test_evictions_equal_the_reference(policy, decay):
    """The same tokens, entropies and answers, over turns in most of which the cache is full."""
    torch.manual_seed(1)
    model = tiny_model(dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model = attach(model)
    encoder = TextEncoder()
    texts = [f"turn {k}" for k in range(12)]
    window = Window(when_full=policy, context=32, decay=decay)
    session = Session(model, encoder, mask="causal", max_new_tokens=6, window=window)
    states = []
    contexts = [encoder.context(text) for text in texts]
    options = {"size": 32, "policy": policy, "decay": decay, "count": 6, "turns": len(texts)}
    answers = reference_answer(model, states, contexts, **options)
    for text, answer, (ids, entropies) in zip(texts, answers, states, strict=True):
        assert session.reply(text) == encoder.decode([token for token in answer if token != 60])
        assert session.fed == ids
        np.testing.assert_allclose(session._cache.entropies, entropies, atol=1e-4)
    assert session._cache.evictions > 8
    assert len(session.fed) <= 32


def test_undo_after_an_eviction():
    """The conversation is fed again, and the session equals one that never asked the removed question."""
    model = attach(tiny_model(dtype=torch.float32))
    window = Window(when_full="sirllm", context=24)

    def session_after(texts, *, undo):
        session = Session(model, TextEncoder(), mask="causal", max_new_tokens=4, window=window)
        for text in texts:
            session.reply(text)
        if undo:
            assert session._cache.evictions
            session.undo()
        return session

    texts = [f"turn {k}" for k in range(8)]
    undone, never = session_after(texts, undo=True), session_after(texts[:-1], undo=False)
    assert undone.messages == never.messages
    assert undone.reply("next") == never.reply("next")
    assert undone.fed == never.fed


def test_under_ism_contexts_stay_bidirectional():
    """Until the cache is full, a session that may evict tokens equals one that may not."""
    model = attach(tiny_model(dtype=torch.float32))
    wide = Session(model, TextEncoder(), mask="ism", max_new_tokens=4)
    ours = Session(
        model, TextEncoder(), mask="ism", max_new_tokens=4, window=Window(when_full="sirllm", context=60, decay=1.0)
    )
    seen = {}
    for name, session in (("wide", wide), ("ours", ours)):
        seen[name] = []
        choose = session._choose
        session._choose = lambda logits, ids, to=seen[name], choose=choose: to.append(logits) or choose(logits, ids)
        for text in ("a", "b", "c"):
            session.reply(text)
    torch.testing.assert_close(torch.stack(seen["ours"]), torch.stack(seen["wide"]), rtol=0, atol=1e-5)
    for text in "defghijkl":
        ours.reply(text)
    assert ours._cache.evictions
    assert len(ours.fed) <= 60


def test_wrong_windows():
    model = attach(tiny_model())
    for options, message in [
        ({"when_full": "drop"}, "--when-full is 'drop'; expected one of stop, drop-oldest, sirllm"),
        ({"context": 0}, "--context is 0; expected 1 token or more"),
        ({"decay": 1.5}, "decay is 1.5; expected 0 to 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            Window(**options)
    with pytest.raises(UsageError, match="--context is 9999; expected at most the model's 2048 positions"):
        Session(model, CharacterEncoder(), mask="ism", window=Window(context=9999))
    with pytest.raises(UsageError, match="--when-full sirllm: the context is 8; expected --context N with N above 8"):
        Session(model, CharacterEncoder(), mask="ism", window=Window(when_full="sirllm", context=8))
    for mask, encoder in (("prefix", CharacterEncoder()), ("ism", AnewEncoder())):
        with pytest.raises(UsageError, match=r"keeps none\. Use stop or drop-oldest"):
            Session(model, encoder, mask=mask, window=Window(when_full="sirllm", context=64))


def test_the_glm_layout_evicts_no_single_tokens():
    encoder = TextEncoder()
    model = attach(glm_model(torch.float32))
    with pytest.raises(UsageError, match="differ on the GLM layout"):
        Session(model, encoder, mask="ism")
    encoder = TextEncoder(GlmTokens(mask_id=MASK_ID, start_id=START_ID, every_answer=True))
    with pytest.raises(UnsupportedModelError, match="takes x, position_ids, position_ids_2; expected"):
        Session(model, encoder, mask="ism", window=Window(when_full="sirllm", context=64))


@pytest.mark.parametrize("when_full", ["sirllm", "streaming"])
def test_a_message_larger_than_the_cache(when_full):
    encoder = TextEncoder()
    lengths = {len(encoder.context(text)): text for text in "abcdefghijklmnopqrstuvwxyz"}
    window = Window(when_full=when_full, context=10)
    session = Session(attach(tiny_model()), encoder, mask="causal", max_new_tokens=4, window=window)
    with pytest.raises(
        DataError, match="the turn and the first 4 tokens would have 9 tokens before the answer; the cache has 10 pos"
    ):
        session.reply(lengths[5])
    for length in (4, 2, 3, 1, 3):
        session.reply(lengths[length])
    assert session._cache.evictions
    assert len(session.fed) <= 10
