"""`generation_inputs` and transformers' `generate` give the answers of sessions."""

from __future__ import annotations

import pytest
import torch

from ismdata.attention.attachment import attach
from ismdata.errors import DataError, UsageError
from ismdata.generate import answer_many, generation_inputs
from ismdata.rendering.glm_tokens import GlmTokens
from tests.generate.test_batched import TalkEncoder, talks
from tests.laws.test_laws_cache import MASK_ID, START_ID, TextEncoder, glm_model
from tests.support.decoders import decoder
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_greedy_answers_are_those_of_sessions(name, mask):
    model, encoder, conversations = attach(decoder(name), mask=mask), TalkEncoder(), talks(6)
    inputs = generation_inputs(model, encoder, conversations)
    assert set(inputs) == {"input_ids", "attention_mask", "kv_end"}
    assert inputs["attention_mask"].sum(1).unique().numel() > 1  # some are padded
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=60, pad_token_id=0)
    answers = []
    for row in made[:, inputs["input_ids"].shape[1] :].tolist():
        end = row.index(60) if 60 in row else len(row)
        answers.append(encoder.decode(row[:end]))
    assert answers == answer_many(model, encoder, conversations, max_new_tokens=8)


def test_the_mask_of_the_call():
    model, conversations = attach(tiny_model(), mask="ism"), talks(3)
    as_causal = generation_inputs(model, TalkEncoder(), conversations, mask="causal")
    length = as_causal["input_ids"].shape[1]
    assert torch.equal(as_causal["kv_end"], torch.arange(1, length + 1).expand(3, length))
    assert not torch.equal(as_causal["kv_end"], generation_inputs(model, TalkEncoder(), conversations)["kv_end"])


def test_refusals():
    model = attach(tiny_model(), mask="ism")
    question = [{"role": "user", "content": "a"}]
    answered = [*question, {"role": "assistant", "content": "b"}]
    with pytest.raises(UsageError, match="conversation 2: nothing to answer"):
        generation_inputs(model, TalkEncoder(), [question, answered])
    with pytest.raises(UsageError, match="tools has 1 entries; expected one for each of 2"):
        generation_inputs(model, TalkEncoder(), [question, question], tools=[None])
    with pytest.raises(UsageError, match="not attached"):
        generation_inputs(tiny_model(), TalkEncoder(), [question])
    model.config.max_position_embeddings = 1
    with pytest.raises(DataError, match=r"conversation 1: has . tokens before the answer; the model has 1 positions"):
        generation_inputs(model, TalkEncoder(), [[{"role": "user", "content": "longer"}]])
    tokens = GlmTokens(mask_id=MASK_ID, start_id=START_ID, every_answer=True)
    with pytest.raises(UsageError, match=r"two positions per token.*answer_many"):
        generation_inputs(attach(glm_model(torch.float64), mask="ism"), TextEncoder(tokens), [question])
