"""Lists of strings."""

from __future__ import annotations

import pytest

from ismdata.convert.formats.registry import detect
from tests.support.records import refusal


@pytest.mark.parametrize(
    "record",
    [{"question_id": 1, "turns": ["q", "r"]}, {"question_id": 1, "choices": [{"index": 0, "turns": ["a"]}]}],
    ids=["questions", "answers"],
)
def test_half_a_dialogue_is_refused(record):
    assert detect(record) == "lists"
    reason, detail = refusal("lists", record)
    assert reason == "missing_role" and "only one speaker's turns" in detail
