"""For real templates, a session feeds the tokens that `pack` writes for the finished conversation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ismdata.generate.session import Session
from ismdata.masks.intervals import ANSWER
from ismdata.rendering.conversation_encoder import ConversationEncoder
from ismdata.rendering.refusals import CannotRender, TemplateRefused
from ismdata.rendering.tracing import Tracer
from tests.conftest import conversations, encoding, template_named
from tests.support.scripted import ScriptedModel

pytestmark = pytest.mark.slow  # packs and feeds under many templates

EOS = 49_999
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello! 你好"},
    {"role": "user", "content": "How do you write <|im_end|>?"},
    {"role": "assistant", "content": "Like that:\n\n1. so"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


class WideModel(ScriptedModel):
    """A scripted model with the size of a real vocabulary."""

    generation_config = SimpleNamespace(eos_token_id=EOS)

    def forward(self, input_ids, past_key_values, logits_to_keep, **intervals):
        states = torch.zeros(1, 1, input_ids.shape[1], 1)
        past_key_values.update(states, states, 0)
        logits = torch.zeros(1, 1, EOS + 1)
        logits[0, 0, self.script.pop(0) if self.script else EOS] = 1
        return SimpleNamespace(logits=logits)


def through_the_last_answer(pieces):
    last = max(place for place, piece in enumerate(pieces, 1) if piece.kind == ANSWER)
    return [id for piece in pieces[:last] for id in piece.ids]


#: One of each kind: plain, with a header or a blank before answers, with reasoning, rewriting history, without an end.
NAMES = [
    "llama3",
    "gemma",
    "qwen2_5",
    "qwen3",
    "gptoss",
    "deepseekv3",
    "phi3",
    "llava_next",
    "nemotron_3_nano",
    "glm4moe",
]


@pytest.mark.parametrize("name", [None, *NAMES], ids=str)
def test_a_session_feeds_what_pack_makes_of_it(name, smollm2):
    """The model writes the answers as `pack` encodes them; then the resulting conversation is packed."""
    with_ = encoding(smollm2, template_named(name), markers=True) if name else encoding(smollm2)
    talk = TALK
    try:
        pieces = with_.document(talk)
    except TemplateRefused:  # no system messages
        talk = TALK[1:]
        pieces = with_.document(talk)
    answers = [k for k, message in enumerate(talk) if message["role"] == "assistant"]
    written = [[id for piece in pieces if piece.message == k for id in piece.ids] for k in answers]
    ends = ConversationEncoder(with_).next_turn_end_ids  # the token that stops the model is fed with the next question
    assert bool(ends) == (name == "glm4moe")
    model = WideModel([id for answer in written for id in [*answer, EOS]])
    system = talk[0]["content"] if talk[0]["role"] == "system" else None
    session = Session(model, ConversationEncoder(with_), mask="ism", system=system)
    for message in talk:
        if message["role"] == "user":
            session.reply(message["content"])
    assert session.fed == through_the_last_answer(pieces)
    assert session.fed == through_the_last_answer(with_.document(session.messages))
    if with_.renderer.profile.end_of_turn:
        assert [m["content"] for m in session.messages] == [m["content"] for m in talk]


def test_a_question_taken_back_takes_the_end_that_it_brought(smollm2):
    """Under GLM's template the token that ends an answer is fed once, with the next question, and removed with it."""
    with_ = encoding(smollm2, template_named("glm4moe"), markers=True)
    pieces = with_.document(TALK)
    written = [[id for piece in pieces if piece.message == k for id in piece.ids] for k in (2, 4)]
    [user] = {written[0][-1]} & ConversationEncoder(with_).next_turn_end_ids
    # The model writes that token to stop. It is fed alone before the next question; the logits after it are dropped.
    unheard = 0
    model = WideModel([*written[0][:-1], user, unheard, 11, 12, EOS, unheard, *written[1][:-1], user])
    session = Session(model, ConversationEncoder(with_), mask="ism", system=TALK[0]["content"])
    session.reply(TALK[1]["content"])
    before = list(session.fed)
    session.reply("Something else")
    session.undo()
    assert session.fed == before
    session.reply(TALK[3]["content"])
    assert session.fed == through_the_last_answer(with_.document(session.messages))


@pytest.mark.parametrize("name", NAMES)
def test_the_next_context_is_what_pack_makes(name, smollm2):
    """The end of the last answer and the context after it are those of the packed conversation with the next answer."""
    renderer = encoding(smollm2, template_named(name), markers=True).renderer
    compared = 0
    for messages in conversations(11):
        try:
            chunks = renderer.append(messages)
        except CannotRender:
            continue
        answers = [place for place, chunk in enumerate(chunks) if chunk.kind == ANSWER]
        for before, place in zip([None, *answers], answers, strict=False):
            context = "".join(chunk.text for chunk in chunks[0 if before is None else before + 1 : place])
            end, brought, found = renderer.next_context(messages[: chunks[place].message])
            assert found == context
            assert end.endswith(brought)
            if before is not None:
                assert chunks[before].text.endswith(end)
            compared += 1
    assert compared >= 3


def test_the_next_context_of_a_long_conversation_takes_as_few_renderings(smollm2):
    with_ = encoding(smollm2)
    messages = [{"role": role, "content": "x"} for _ in range(50) for role in ("user", "assistant")]
    template = with_.renderer.template
    renders = []
    counted = SimpleNamespace(
        constants=template.constants, render=lambda *a, **k: renders.append(a) or template.render(*a, **k)
    )
    counts = []
    for length in (2, 100):
        renders.clear()
        renderer = replace(with_.renderer, tracer=Tracer(counted))  # with empty caches
        assert renderer.next_context([*messages[:length], {"role": "user", "content": "y"}])[2]
        counts.append(len(renders))
    assert counts[0] == counts[1]
