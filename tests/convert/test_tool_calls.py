"""Tool calls and tool descriptions of every shape that corpora use, in OpenAI's."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from ismdata.convert.tool_calls import NULL_ARGUMENTS, NULL_SCHEMAS
from tests.support.one_corpus import convert_text, lines
from tests.support.records import conversations, refusal
from tests.support.shapes import QA, A, U, chat

F = {"type": "function", "function": {"name": "f"}}


def tools_of(value):
    (conversation,) = conversations("messages", {"messages": chat(*QA), "tools": value})
    return None if conversation["tools"] is None else json.loads(conversation["tools"])


def arguments_of(calls, tools=None):
    (conversation,) = conversations("messages", {"messages": [{"role": A, "tool_calls": calls}], "tools": tools})
    return [call["function"]["arguments"] for call in json.loads(conversation["messages"][0]["tool_calls"])]


@pytest.mark.parametrize("value", [None, "", " ", "[]", "{}", "null", "None", [], {}, {"name": None}])
def test_no_tools(value):
    assert tools_of(value) is None


@pytest.mark.parametrize("value", [
    {"name": "f"}, [{"name": "f"}], '[{"name": "f"}]', ['{"name": "f"}'], F, [F], {"type": "function", "name": "f"},
])  # fmt: skip
def test_one_tool(value):
    assert tools_of(value) == [F]


@pytest.mark.parametrize(
    "value", [[{}], [None], "clock", [{"name": ""}], {"x": 1}, [{"type": "function", "function": {}}]]
)
def test_tools_without_a_name_are_refused(value):
    assert refusal("messages", {"messages": chat(*QA), "tools": value})[0] == "invalid_tools"


def test_tools_of_the_service_stay():
    assert tools_of([{"type": "web_search"}]) == [{"type": "web_search"}]


@pytest.mark.parametrize("nothing", ["", "[]", "null", " ", [], {}, {"name": None, "arguments": None}])
def test_no_calls(nothing):
    message = {"role": A, "content": "a", "tool_calls": nothing, "function_call": nothing}
    (conversation,) = conversations("messages", {"messages": [message]})
    assert conversation["messages"][0]["tool_calls"] is None


def test_arguments_that_were_encoded_twice():
    inner = json.dumps({"x": 1})
    assert arguments_of([{"name": "f", "arguments": json.dumps(inner)}]) == [inner]
    for kept in (json.dumps("text"), '"open', "{}", {"x": json.dumps(inner)}):
        assert arguments_of([{"name": "f", "arguments": kept}]) == [kept]


def test_null_arguments_stay_where_the_schema_requires_or_allows_them():
    call = {"name": "f", "arguments": {"a": None, "b": None, "c": None, "d": [{"e": None, "g": 1}], "h": {"i": None}}}
    assert arguments_of([call]) == [{"d": [{"g": 1}], "h": {}}]
    inner = {"items": {"required": ["e"]}}
    schema = {"required": ["a"], "properties": {"b": {"type": ["string", "null"]}, "c": {"type": "string"}, "d": inner}}
    described = [{"name": "f", "parameters": schema}]
    assert arguments_of([call], described) == [{"a": None, "b": None, "d": [{"e": None, "g": 1}], "h": {}}]
    flat = [{"name": "f", "parameters": {"a": {"type": "int"}, "c": {"anyOf": [{"type": "int"}, {"type": "null"}]}}}]
    assert arguments_of([call], flat) == [{"c": None, "d": [{"g": 1}], "h": {}}]
    text = json.dumps(call["arguments"])
    assert arguments_of([{"name": "f", "arguments": text}]) == [text]


def test_tables_fill_arguments_with_null(tmp_path):
    def talk(name, **arguments):
        call = {"function": {"name": name, "arguments": arguments}}
        return [*chat((U, "q")), {"role": A, "content": None, "tool_calls": [call]}, *chat(("tool", "1"), (A, "a"))]

    table = pa.table({"messages": [talk("f", x=1), talk("g", y="a")]})
    found = convert_text(tmp_path, table)
    calls = [json.loads(row["messages"][1]["tool_calls"])[0]["function"] for row in found.rows]
    assert calls == [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "a"}}]
    assert found.report.ignored_fields == {NULL_ARGUMENTS: 2}


def test_tables_fill_descriptions_with_null(tmp_path):
    def tool(name, **properties):
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [tool("f", x={"type": "string", "enum": ["a"]}), tool("g", y={"type": "integer"})]
    found = convert_text(tmp_path, pa.table({"messages": [chat(*QA)], "tools": [tools]}))
    (row,) = found.rows
    assert json.loads(row["tools"]) == tools
    assert found.report.ignored_fields == {NULL_SCHEMAS: 2}


def test_nulls_that_a_schema_may_have():
    schema = {"properties": {"x": {"default": None, "enum": ["a", None]}, "y": None}, "required": None}
    kept = {"properties": {"x": {"default": None, "enum": ["a", None]}}}
    assert tools_of([{"name": "f", "parameters": schema}])[0]["function"]["parameters"] == kept


def test_not_a_number_among_arguments_is_refused(tmp_path):
    calls = [{"name": "f", "arguments": {"x": float("nan")}}]
    sound = {"messages": chat(*QA)}
    found = convert_text(tmp_path, lines(sound, {"messages": [{"role": A, "tool_calls": calls}]}))
    assert found.reasons == ["invalid_field"]
