"""A prompt and its completion; Alpaca's prompts that hold a dialogue."""

from __future__ import annotations

from ismdata.convert.formats.registry import detect
from tests.support.records import read
from tests.support.shapes import A, U


def test_a_prompt_that_holds_the_dialogue_so_far():
    record = {"instruction": "Human:a\nAssistant:b\nHuman:c\nAssistant:", "input": "", "output": "d"}
    assert read("alpaca", record) == [[(U, "a"), (A, "b"), (U, "c"), (A, "d")]]
    for other in ("Complete:\nHuman:a\nAssistant:", "Human:a\nHuman:b\nAssistant:", "Human:a\nAssistant:b"):
        assert read("alpaca", {**record, "instruction": other}) == [[(U, other), (A, "d")]]


def test_an_input_beside_an_output_is_a_prompt():
    record = {"input": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "output": "d"}
    assert detect(record) == "prompt_completion"
