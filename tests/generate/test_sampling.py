"""Compare sampling with transformers' `generate`, and the end of an answer with its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from ismdata.generate.sampling import EndOfTurn, Sampling, can_show, make_sampler, message_text
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")


def test_greedy_decoding_with_a_repetition_penalty_equals_generate():
    model = tiny_model()
    prompt = torch.tensor([[5, 9, 17, 5, 30]])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, repetition_penalty=1.7, pad_token_id=0)
    choose, ids = make_sampler(Sampling(repetition_penalty=1.7), CPU), prompt[0].tolist()
    for _ in range(12):
        with torch.no_grad():
            ids.append(choose(model(torch.tensor([ids])).logits[0, -1], ids))
    assert ids == expected[0].tolist()
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert ids != plain[0].tolist()


#: Logits whose probabilities are 0.5, 0.25, 0.125, 0.0625, 0.0625.
LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 3, "min_p": 0.3}, {0, 1}),
    ],
    ids=["all", "top_k", "top_p", "min_p", "top_k and min_p"],
)
def test_only_allowed_tokens_are_sampled(options, possible):
    choose = make_sampler(Sampling(temperature=1.0, **options), CPU)
    assert {choose(LOGITS, [0]) for _ in range(400)} == possible


def test_temperature_and_penalty_change_frequencies():
    def share(ids, **options):
        choose = make_sampler(Sampling(**options), CPU)
        return sum(choose(LOGITS, ids) == 0 for _ in range(400)) / 400

    assert share([], temperature=1.0) < 0.6
    assert share([], temperature=0.25) > 0.85
    assert share([0], temperature=1.0, repetition_penalty=3.0) < 0.3


def test_the_end_of_turn_by_its_definition():
    """All answers of up to four tokens over a small alphabet, with the longest overlap found by trying all."""
    end = EndOfTurn(ids=(1, 2, 1), stop_ids=frozenset({1, 9}))
    for length in range(5):
        for answer in itertools.product((1, 2, 3), repeat=length):
            overlap = max(n for n in range(4) if answer[length - n :] == (1, 2, 1)[:n] and n <= length)
            assert end.is_complete(answer) == (overlap == 3)
            assert end.missing(answer) == [1, 2, 1][overlap:]
            assert end.content(answer) == list(answer[: length - overlap])
    assert [end.is_stop(token) for token in (1, 9, 3)] == [
        False,
        True,
        False,
    ]  # 1 belongs to the end of turn


def test_the_lead_that_the_template_writes_is_not_shown():
    lead = "<think></think>"
    assert [can_show(text, lead) for text in ("", "<", "<think></thin", lead)] == [False] * 4
    assert [can_show(text, lead) for text in (lead + "a", "<think>why", "b")] == [True] * 3
    assert message_text(lead + "a", lead) == "a"
    assert message_text("<think>why</think>a", lead) == "<think>why</think>a"
    assert can_show("", "")
    assert not can_show("caf\N{REPLACEMENT CHARACTER}", "")
