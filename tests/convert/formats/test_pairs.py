"""Exchanges: empty sides, exchanges in numbered fields, several answers, system prompts, reasoning."""

from __future__ import annotations

import json

import pytest

from tests.support.one_corpus import convert_text, lines
from tests.support.records import conversations, read, refusal
from tests.support.shapes import MORE, QA, A, Q, R, S, U, chat

BRIEF = (S, "Be brief.")


@pytest.mark.parametrize("nothing", ["", " \n", None])
@pytest.mark.parametrize("pair", [list, lambda pair: {"human": pair[0], "assistant": pair[1]}])
def test_an_empty_side_is_no_message(nothing, pair):
    def talk(*pairs):
        return {"conversation": [pair(one) for one in pairs]}

    assert read("pairs", talk((Q, R), ("bye", nothing))) == [[*QA, (U, "bye")]]
    assert read("pairs", talk((nothing, "Hello"), (Q, R))) == [[(A, "Hello"), *QA]]
    assert refusal("pairs", talk((Q, nothing), ("again", R)))[0] in ("empty_answer", "missing_content")
    assert refusal("pairs", talk((Q, nothing)))[0] == "empty_answer"


@pytest.mark.parametrize("nothing", ["", " "])
def test_an_empty_side_of_a_history(tmp_path, nothing):
    history = {"history": [[nothing, "Hello"], [Q, R]]}
    expected = [(A, "Hello"), *QA, (U, "q"), (A, "a")]
    assert read("prompt_completion", {"prompt": "q", "completion": "a", **history}) == [expected]
    found = convert_text(
        tmp_path, lines({"instruction": "q", "output": "a", **history}, {"instruction": Q, "output": R})
    )
    assert found.turns == [expected, QA]


@pytest.mark.parametrize("record", [
    {"question": Q, "answer": R, "question_2": "And then?", "answer_2": "No."},
    {"question": Q, "answer": R, "question_1": "And then?", "answer_1": "No."},
    {"answer_2": "No.", "question_2": "And then?", "question_1": Q, "answer_1": R},
    {"Prompt": Q, "Response": R, "Prompt 2": "", "Response 2": None, "prompt3": "And then?", "response3": "No."},
    {"message_1": Q, "message_2": R, "message_3": "And then?", "message_4": "No.", "message_5": ""},
    {"user_1": Q, "assistant_1": R, "user_2": "And then?", "assistant_2": "No."},
    {"q1": Q, "a1": R, "q2": "And then?", "a2": "No."},
    {"question_0": Q, "answer_0": R, "question_10": "And then?", "answer_10": "No."},
])  # fmt: skip
def test_exchanges_in_numbered_fields(tmp_path, record):
    found = convert_text(tmp_path, lines(record))
    assert found.turns == [MORE]
    assert not any(json.loads(found.rows[0]["meta"] or "{}").values())


def test_numbered_fields_of_alpaca(tmp_path):
    later = {"instruction_2": "And", "input_2": "then?", "output_2": "No."}
    found = convert_text(tmp_path, lines({"instruction": Q, "input": "", "output": R, **later}))
    assert found.turns == [[*QA, (U, "And\nthen?"), (A, "No.")]]
    assert found.rows[0]["meta"] is None


def test_numbered_fields_that_end_with_the_user():
    assert read("prompt_completion", {"message_1": Q, "message_2": R, "message_3": "Bye"}) == [[*QA, (U, "Bye")]]
    assert read("prompt_completion", {"q": Q, "question": Q, "answer": R, "question_2": "Bye", "answer_2": ""}) == [
        [*QA, (U, "Bye")]
    ]


def test_another_answer_stays_metadata():
    (conversation,) = conversations("prompt_completion", {"prompt": Q, "response": R, "response_2": "Closed."})
    assert json.loads(conversation["meta"]) == {"response_2": "Closed."}


@pytest.mark.parametrize(("name", "record"), [
    ("prompt_completion", {"prompt": Q, "response": [R]}), ("prompt_completion", {"Question": Q, "Answer": [R]}),
    ("alpaca", {"instruction": Q, "input": "", "output": [R]}),
])  # fmt: skip
def test_a_list_of_answers(tmp_path, name, record):
    assert convert_text(tmp_path, lines(record)).turns == [QA]
    (field,) = (field for field, value in record.items() if isinstance(value, list))
    reason, detail = refusal(name, {**record, field: [R, "Closed."]})
    assert reason == "invalid_field" and "2 texts" in detail and "several answers" in detail


TALKS = [
    {"messages": chat(*QA)}, {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": R}]},
    {"conversation": [{"input": Q, "output": R}]},
]  # fmt: skip


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", ["system_message", "sys", "system prompt", "systemPrompt", "System", "instruction"])
def test_system_prompts_under_other_names(tmp_path, talk, name):
    beside = {"n": 1}
    found = convert_text(tmp_path, lines({**talk, **beside}, {**talk, name: "Be brief.", **beside}, {**talk, name: ""}))
    assert found.turns == [QA, [BRIEF, *QA], QA]


@pytest.mark.parametrize("talk", TALKS)
def test_what_may_be_no_system_prompt(talk):
    (name,) = ({"messages": "messages", "conversations": "sharegpt", "conversation": "pairs"}[next(iter(talk))],)
    assert read(name, {**talk, "persona": "You are a baker."}) == [[(S, "You are a baker."), *QA]]
    assert read(name, {**talk, "persona": "a baker of 30", "sys": 3}) == [QA]
    assert read(name, {**talk, "persona": "You are a baker.", "system": "Be brief."}) == [[BRIEF, *QA]]
    assert read(name, {**talk, "instruction": Q}) == [QA]
    assert read(name, {**talk, "instruction": "Be brief.", "output": R}) == [QA]
    assert read(name, {**talk, "sys": "Be brief.", "system": "Be brief."}) == [[BRIEF, *QA]]


def test_system_prompts_of_transcripts():
    talk = {"utterances": [{"speaker": "user", "text": Q}, {"speaker": "bot", "text": R}], "system": "Meena"}
    assert read("utterances", {**talk, "system_prompt": "Be brief."}) == [[BRIEF, *QA]]
    assert read("lists", {"dialog": [Q, R], "system_message": "Be brief."}) == [[BRIEF, *QA]]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "cot", "Complex_CoT"])
def test_reasoning_beside_an_exchange(name):
    for record in ({"question": Q, "answer": R}, {"instruction": Q, "output": R}):
        kind = "alpaca" if "output" in record else "prompt_completion"
        (conversation,) = conversations(kind, {**record, name: "It is Monday."})
        assert conversation["messages"][-1]["reasoning_content"] == "It is Monday."
        (conversation,) = conversations(kind, {**record, name: "off"})
        assert json.loads(conversation["meta"]) == {name: "off"}


@pytest.mark.parametrize("nothing", ["", " \n", "\u3000"])
def test_an_empty_question_is_no_message(tmp_path, nothing):
    assert read("prompt_completion", {"prompt": nothing, "completion": R}) == [[(A, R)]]
    records = {"instruction": nothing, "input": "", "output": R}, {"instruction": Q, "output": R}
    assert convert_text(tmp_path, lines(*records)).turns == [[(A, R)], QA]
