"""Lists of strings."""

from __future__ import annotations

import pytest

from ismdata.convert.formats.registry import detect
from tests.support.one_corpus import convert_text, lines
from tests.support.records import read, refusal
from tests.support.shapes import A, U


@pytest.mark.parametrize(
    "record",
    [{"question_id": 1, "turns": ["q", "r"]}, {"question_id": 1, "choices": [{"index": 0, "turns": ["a"]}]}],
    ids=["questions", "answers"],
)
def test_half_a_dialogue_is_refused(record):
    assert detect(record) == "lists"
    reason, detail = refusal("lists", record)
    assert reason == "missing_role" and "only one speaker's turns" in detail


@pytest.mark.parametrize("layout", [lambda talk: talk, lambda talk: {"utterances": talk}])
@pytest.mark.parametrize(("texts", "expected"), [
    (["doctor: Where?", "patient: Knee.", "patient: And hip.", "doctor: Rest."],
     [(A, "Where?"), (U, "Knee."), (U, "And hip."), (A, "Rest.")]),
    (["Bot: Hello", "User: Hi: you"], [(A, "Hello"), (U, "Hi: you")]),
    (["W: Hi", "M: Hm"], [(U, "Hi"), (A, "Hm")]),
    (["Ann：你好", "Bo：再见\n明天"], [(U, "你好"), (A, "再见\n明天")]),
    (["user: Hi"], [(U, "Hi")]),
])  # fmt: skip
def test_names_before_the_texts(tmp_path, layout, texts, expected):
    found = convert_text(tmp_path, lines(layout(["Hi", "Hm"]), layout(texts)))
    assert found.turns == [[(U, "Hi"), (A, "Hm")], expected]


@pytest.mark.parametrize("texts", [
    ["Note: no name", "Fine."], ["Note: one", "Warning: two"], ["http://a.b", "https://c.d"], ["10:30?", "11:15."],
    ["Ann: Hi", "Bo: Hm", "Cy: Ho"], ["Ann: Hi", "Hm"], ["Is it, well: so?", "No. And: yes"],
])  # fmt: skip
def test_colons_that_follow_no_name(texts):
    assert read("lists", texts) == [[((U, A)[at % 2], text) for at, text in enumerate(texts)]]


def test_names_before_some_of_the_texts():
    reason, detail = refusal("lists", ["user: Hi", "assistant: Hm", "Well."])
    assert reason == "missing_role" and "message 3" in detail
