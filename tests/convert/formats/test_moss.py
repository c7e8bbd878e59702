"""MOSS: channels, marks and commands."""

from __future__ import annotations

import json

import pytest

from tests.support.records import conversations, read, refusal, turns_of
from tests.support.shapes import A, S, T, U, moss_turn

META = "You are an AI.\n- Web search: enabled. API: Search(query)\n- Calculator: enabled. API: Calculate(expression)\n"


def test_the_channels_of_a_turn():
    turn = moss_turn("Sum?", "It is 4.", "Add.", 'Search("a, b"), Calculate("1+(3)")', "=> 4")
    record = {"conversation_id": 5, "meta_instruction": META, "num_turns": 1, "category": "x", "chat": {"turn_1": turn}}
    (conversation,) = conversations("moss", record)
    system, user, call, tool, answer = conversation["messages"]
    assert (system["role"], system["content"]) == (S, META.strip())
    assert (user["role"], user["content"]) == (U, "Sum?")
    assert (call["role"], call["content"], call["reasoning_content"]) == (A, None, "Add.")
    assert [one["function"] for one in json.loads(call["tool_calls"])] == [
        {"name": "Search", "arguments": {"query": "a, b"}},
        {"name": "Calculate", "arguments": {"expression": "1+(3)"}},
    ]
    assert (tool["role"], tool["content"]) == (T, "=> 4")
    assert (answer["role"], answer["content"], answer["reasoning_content"]) == (A, "It is 4.", None)
    # The ids of a folder's files begin anew in the next folder.
    assert conversation["id"] is None
    assert json.loads(conversation["meta"]) == {"conversation_id": 5, "category": "x"}


def test_turns_come_by_number_and_thoughts_without_a_command_belong_to_the_answer():
    numbers = [10, 2, 1]
    chat = {f"turn_{number}": moss_turn(f"q{number}", f"a{number}", f"t{number}") for number in numbers}
    (conversation,) = conversations("moss", {"chat": chat})
    assert turns_of(conversation) == [pair for n in (1, 2, 10) for pair in ((U, f"q{n}"), (A, f"a{n}"))]
    assert [message["reasoning_content"] for message in conversation["messages"]] == [
        None,
        "t1",
        None,
        "t2",
        None,
        "t10",
    ]


@pytest.mark.parametrize("commands", ["None", "None.", "Non", "None (nothing to call)", "", " None "])
def test_channels_that_say_none(commands):
    (conversation,) = conversations("moss", {"chat": {"turn_1": moss_turn("q", "a", commands=commands)}})
    assert turns_of(conversation) == [(U, "q"), (A, "a")]


@pytest.mark.parametrize(
    ("commands", "names"),
    [
        ('Search("x")', ["Search"]),
        ('Search("x"), None', ["Search"]),
        ('Search("x") ,\nAdd("y"),', ["Search", "Add"]),
        ('A("")', ["A"]),
        ("Search(x)", None),
        ('Search("x") = 0', None),
        ('Search("x", "y")', None),
        ('1. Search("x")', None),
        ('Search("x".lower())', None),
        ("Nonesuch", None),
    ],
)
def test_commands(commands, names):
    record = {"chat": {"turn_1": moss_turn("q", "a", commands=commands)}}
    if names is None:
        assert refusal("moss", record)[0] == "invalid_tool_call"
    else:
        calls = json.loads(conversations("moss", record)[0]["messages"][1]["tool_calls"])
        assert [call["function"]["name"] for call in calls] == names


def test_marks_go_at_the_ends_only():
    record = {"chat": {"turn_1": moss_turn("What does <eoh> mean?", "<|MOSS|>: is a mark <|1|> <eor>")}}
    assert read("moss", record) == [[(U, "What does <eoh> mean?"), (A, "<|MOSS|>: is a mark <|1|>")]]
    bare = {"chat": {"turn_1": {"Human": "<|Human|>:<eoh>", "MOSS": "<|MOSS|>:<eoh><eoh>a <eom> \n<eor><eom>"}}}
    assert read("moss", bare) == [[(U, ""), (A, "<eoh><eoh>a")]]
