"""`answer_many` gives the answers that single sessions give."""

from __future__ import annotations

import random

import pytest
import torch

from ismdata.attention.attachment import attach
from ismdata.errors import DataError, UsageError
from ismdata.generate import batched, greedy
from ismdata.generate.batched import answer_many
from ismdata.generate.session import Session
from ismdata.masks.intervals import ANSWER, QUERY
from ismdata.rendering.glm_tokens import GlmTokens
from ismdata.rendering.pieces import Piece
from tests.laws.test_laws_cache import MASK_ID, START_ID, TextEncoder, glm_model
from tests.support.tiny import tiny_model


class TalkEncoder(TextEncoder):
    """Encodes an answer in the history as random tokens, seeded by its text."""

    def document(self, messages, tools=None):
        return [
            Piece(
                span=k,
                kind=ANSWER if message["role"] == "assistant" else QUERY,
                message=k if message["role"] == "assistant" else -1,
                ids=tuple(self.context(message["content"])) + (60,) * (message["role"] == "assistant"),
            )
            for k, message in enumerate(messages)
        ]


def talks(count):
    made = random.Random(3)
    roles = ["user", "assistant"]
    return [
        [{"role": roles[k % 2], "content": str(made.random())} for k in range(2 * made.randrange(4) + 1)]
        for _ in range(count)
    ]


def one_by_one(model, encoder, conversations, mask, **options):
    """The answers of sessions, and the logits on which each token was chosen."""
    answers, logits = [], []
    for messages in conversations:
        session = Session(model, encoder, mask=mask, **options)
        choose, seen = session._choose, []
        session._choose = lambda row, ids, choose=choose, seen=seen: seen.append(row) or choose(row, ids)
        session.give(messages)
        answers.append("".join(session.answer()))
        logits.append(torch.stack(seen))
    return answers, logits


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "glm"])
@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
def test_batched_answers_equal_those_of_sessions(architecture, mask, monkeypatch):
    """The same tokens, on logits equal to 1e-5 in float32, whatever the batch size."""
    glm = GlmTokens(mask_id=MASK_ID, start_id=START_ID, every_answer=True) if architecture == "glm" else None
    model = attach(glm_model(torch.float32) if glm else tiny_model(architecture, dtype=torch.float32))
    encoder, conversations = TalkEncoder(glm), talks(7)
    _, chosen_on = one_by_one(model, encoder, conversations, mask, max_new_tokens=6)
    encoder.ending = [int(chosen_on[0][2].argmax())]
    expected, chosen_on = one_by_one(model, encoder, conversations, mask, max_new_tokens=6)
    assert len(chosen_on[0]) <= 3
    assert len({len(logits) for logits in chosen_on}) > 1  # they end at different times

    given, seen = [], []
    greedy_answers = batched.greedy_answers
    monkeypatch.setattr(
        batched, "greedy_answers", lambda *all, **named: given.append(all[1]) or greedy_answers(*all, **named)
    )
    feed = greedy._forward
    monkeypatch.setattr(greedy, "_forward", lambda *all, **named: seen.append(feed(*all, **named)) or seen[-1])
    for batch_size in (1, 3, 16):
        assert (
            answer_many(model, encoder, conversations, mask=mask, max_new_tokens=6, batch_size=batch_size) == expected
        )
    order = sorted(range(7), key=lambda k: -len(given[-1][k]))
    first = seen[-max(map(len, chosen_on))]  # the prefill of the one batch of 16, longest conversation first
    torch.testing.assert_close(first, torch.stack([chosen_on[k][0] for k in order]), rtol=0, atol=1e-5)


def test_answers_that_fill_the_positions():
    model = attach(tiny_model(dtype=torch.float32))
    model.config.max_position_embeddings = 24
    encoder, conversations = TalkEncoder(), talks(12)
    fitting = [
        messages for messages in conversations if sum(len(piece.ids) for piece in encoder.document(messages)) < 20
    ]
    assert len(fitting) > 2
    expected, _ = one_by_one(model, encoder, fitting, "ism", max_new_tokens=50)
    assert answer_many(model, encoder, fitting, mask="ism", max_new_tokens=50) == expected


def test_no_conversations_and_wrong_calls():
    model, encoder = attach(tiny_model()), TalkEncoder()
    question = [{"role": "user", "content": "a"}]
    assert answer_many(model, encoder, [], mask="ism") == []
    with pytest.raises(UsageError, match="conversation 2: nothing to answer"):
        answer_many(model, encoder, [question, [*question, {"role": "assistant", "content": "b"}]], mask="ism")
    with pytest.raises(UsageError, match="batch_size is 0; expected 1 or more"):
        answer_many(model, encoder, [question], mask="ism", batch_size=0)
    with pytest.raises(UsageError, match="tools has 2 entries; expected one for each of 1 conversations"):
        answer_many(model, encoder, [question], mask="ism", tools=[None, None])
    model.config.max_position_embeddings = 4
    encoder.context = lambda text: [5] * 5
    with pytest.raises(DataError, match="conversation 1: has 5 tokens before the answer; the model has 4 positions"):
        answer_many(model, encoder, [question], mask="ism")
