"""Law 3, through chat's own code: fed turn by turn with a KV cache, a conversation has the full forward's logits."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ismdata.attention import attach
from ismdata.backends import BACKENDS
from ismdata.chat import Chat, Sampling, feed
from ismdata.collate import Collator
from tests.tiny import ANSWER, ARCHITECTURES, QUERY, sample, tiny_model

CLOSE = {"rtol": 0, "atol": 1e-9}
TURNS = [(QUERY, 5), (ANSWER, 4), (QUERY, 1), (ANSWER, 1), (QUERY, 6), (ANSWER, 5)]


class FixedEncoder:
    """Context k is fixed random tokens; an answer ends with the tokens `ending`."""

    def __init__(self, lengths=(5, 1, 6), ending=(60,)):
        generator = torch.Generator().manual_seed(5)
        self.contexts = [torch.randint(2, 50, (length,), generator=generator).tolist() for length in lengths]
        self.ending = list(ending)

    @property
    def end_of_turn_ids(self):
        return self.ending

    history = "append"

    def next_context(self, messages):
        return list(self.contexts[sum(message["role"] == "user" for message in messages) - 1])

    def decode(self, ids):
        return "".join(chr(0x100 + token) for token in ids)


def full_logits(model, document, tokens, mask):
    batch = Collator()([sample([document], mask=mask, tokens=tokens)])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[0, : len(tokens)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mask", ["ism", "causal"])
def test_law_3_turn_by_turn_equals_the_full_forward(architecture, mask):
    model = attach(tiny_model(architecture))
    tokens = sample([TURNS], seed=11).sequence.input_ids.tolist()
    expected = full_logits(model, TURNS, tokens[: sum(length for _, length in TURNS)], mask)
    cache, at = DynamicCache(config=model.config), 0
    for kind, length in TURNS:
        if kind == QUERY:
            logits = feed(model, tokens[at : at + length], cache, bidirectional=mask == "ism")
            torch.testing.assert_close(logits, expected[at + length - 1], **CLOSE)
        else:
            for place in range(at, at + length):
                logits = feed(model, [tokens[place]], cache, bidirectional=False)
                torch.testing.assert_close(logits, expected[place], **CLOSE)
        at += length
    assert cache.get_seq_length() == at


def test_a_causal_prefill_of_ism_contexts_is_another_model():
    """The law's test can fail: the wrong prefill gives other logits."""
    model = attach(tiny_model())
    tokens = sample([TURNS], seed=11).sequence.input_ids[:5].tolist()
    expected = full_logits(model, TURNS[:1], tokens, "ism")[-1]
    wrong = feed(model, tokens, DynamicCache(config=model.config), bidirectional=False)
    assert (wrong - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [(each, "sdpa") for each in ARCHITECTURES] + [("llama", each) for each in BACKENDS if each != "sdpa"],
)
@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
def test_law_3_a_whole_chat(architecture, backend, mask):
    """Three turns of greedy chat: every choice was made on the logits that one full forward of the mask gives."""
    model = attach(tiny_model(architecture), backend=backend)
    encoder = FixedEncoder()
    chat = Chat(model, encoder, mask=mask, max_new_tokens=4)
    seen = []
    choose = chat._choose
    chat._choose = lambda logits: seen.append(logits) or choose(logits)
    document, at = [], 0
    for context in encoder.contexts:
        seen.clear()
        chat.reply("…")
        document.append((QUERY, len(context)))
        at += len(context)
        document.append((ANSWER, len(chat.fed) - at))
        assert chat.fed[at - len(context) : at] == context
        expected = full_logits(model, document, chat.fed, mask)
        torch.testing.assert_close(torch.stack(seen), expected[at - 1 : at - 1 + len(seen)], **CLOSE)
        at = len(chat.fed)
        assert chat.cache.get_seq_length() == at
        assert chat.fed[-1] == 60  # cut by max_new_tokens or not, the end of turn was fed
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_sampling_is_reproducible_and_greedy_at_the_limit():
    model = attach(tiny_model())

    def said(**options):
        return Chat(model, FixedEncoder(), mask="ism", max_new_tokens=8, sampling=Sampling(**options)).reply("…")

    assert said(temperature=1.5, seed=1) == said(temperature=1.5, seed=1)
    assert said(temperature=1.5, seed=1) != said(temperature=1.5, seed=2)
    assert said(temperature=5.0, top_p=1e-6) == said()
