"""Preference data: pairs of answers, labelled answers, battles."""

from __future__ import annotations

import json

import pytest

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import Choices, with_choices
from ismdata.convert.formats.registry import FORMATS
from tests.support.records import conversations, read, refusal
from tests.support.shapes import BATTLE, A, Q, U, chat


def test_a_side_must_be_asked_for():
    record = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    reason, detail = refusal("preference", record)
    assert reason == "no_preference" and "--preference chosen" in detail
    assert read("preference", record, preference="rejected") == [[(U, "q"), (A, "bad")]]
    (draft,) = with_choices(FORMATS["preference"], Choices(roles=ROLE_NAMES, preference="chosen")).parse_record(record)
    assert list(draft.ignored) == ["rejected"]


def test_a_prompt_that_the_side_does_not_repeat_is_kept():
    side = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (conversation,) = conversations("preference", {"prompt": "p", "chosen": side, "rejected": []}, preference="chosen")
    assert json.loads(conversation["meta"]) == {"prompt": "p"}


@pytest.mark.parametrize(("label", "preference", "kept"), [
    (True, None, True), (True, "chosen", True), (True, "rejected", False),
    (False, None, False), (False, "chosen", False), (False, "rejected", True),
])  # fmt: skip
def test_marked_answers(label, preference, kept):
    record = {"prompt": "q", "completion": "a", "label": label}
    if kept:
        assert read("kto", record, preference=preference) == [[(U, "q"), (A, "a")]]
    else:
        assert refusal("kto", record, preference=preference)[0] == "rejected"


def test_a_battle_that_no_one_won_has_no_better_side():
    reason, detail = refusal("preference", {**BATTLE, "winner": "tie"}, preference="chosen")
    assert reason == "no_preference" and "'tie'" in detail
    assert read("preference", {**BATTLE, "winner": "model_b"}, preference="rejected") == [[(U, Q), (A, "No.")]]


@pytest.mark.parametrize("worse", ["No.", chat((A, "No."))])
def test_a_worse_last_answer_beside_messages(worse):
    record = {"messages": chat((U, Q), (A, "Yes.")), "rejected_response": worse}
    assert refusal("preference", record)[0] == "no_preference"
    assert read("preference", record, preference="chosen") == [[(U, Q), (A, "Yes.")]]
    assert read("preference", record, preference="rejected") == [[(U, Q), (A, "No.")]]


def test_worse_messages_beside_messages():
    record = {"messages": chat((U, Q), (A, "Yes.")), "rejected_messages": chat((U, Q), (A, "No."))}
    assert read("preference", record, preference="chosen") == [[(U, Q), (A, "Yes.")]]
    assert read("preference", record, preference="rejected") == [[(U, Q), (A, "No.")]]
