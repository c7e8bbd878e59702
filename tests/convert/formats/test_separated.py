"""A dialogue in one string: Glaive's function calls."""

from __future__ import annotations

import json

from tests.support.records import conversations, refusal, turns_of
from tests.support.shapes import A, T, U


def test_calls_in_glaives_texts():
    text = "USER: n?\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\nFUNCTION RESPONSE: 14\n\n\nASSISTANT: 14"
    call = """{"name": "f", "arguments": '{"a": "it's"}'}"""
    (conversation,) = conversations("separated", {"chat": text.replace("{}", call)})
    assert turns_of(conversation) == [(U, "n?"), (A, None), (T, "14"), (A, "14")]
    (found,) = json.loads(conversation["messages"][1]["tool_calls"])
    assert found["function"] == {"name": "f", "arguments": '{"a": "it\'s"}'}
    assert refusal("separated", {"chat": text.replace("{}", "{broken")})[0] == "invalid_tool_call"
