"""Messages made of blocks: tools and pictures in the shapes of the APIs."""

from __future__ import annotations

import json

import pytest

from tests.support.records import conversations, refusal, turns_of
from tests.support.shapes import A, T, U

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


DESCRIBED = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


ANTHROPIC = {
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t"}, {"type": "text", "text": "See."},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "14"},
                                     {"type": "text", "text": "Well?"}]},
        {"role": "assistant", "content": "14."},
    ],
}  # fmt: skip


BEDROCK = {
    "toolConfig": {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}]},
    "messages": [
        {"role": "user", "content": [{"text": "q"}]},
        {"role": "assistant", "content": [
            {"reasoningContent": {"reasoningText": {"text": "t"}}}, {"text": "See."},
            {"toolUse": {"toolUseId": "1", "name": "f", "input": {"a": 1}}}]},
        {"role": "user", "content": [{"toolResult": {"toolUseId": "1", "content": [{"json": 14}]}}, {"text": "Well?"}]},
        {"role": "assistant", "content": [{"text": "14."}]},
    ],
}  # fmt: skip


GEMINI_TOOLS = {
    "tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "object"}}]}],
    "contents": [
        {"role": "user", "parts": [{"text": "q"}]},
        {"role": "model", "parts": [
            {"text": "t", "thought": True}, {"text": "See."},
            {"functionCall": {"id": "1", "name": "f", "args": {"a": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"id": "1", "name": "f", "response": 14}}, {"text": "Well?"}]},
        {"role": "model", "parts": [{"text": "14."}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "record"),
    [("messages", ANTHROPIC), ("messages", BEDROCK), ("gemini", GEMINI_TOOLS)],
    ids=["anthropic", "bedrock", "gemini"],
)
def test_tools_of_all_apis_come_out_alike(name, record):
    (conversation,) = conversations(name, record)
    assert turns_of(conversation) == [(U, "q"), (A, "See."), (T, "14"), (U, "Well?"), (A, "14.")]
    call = conversation["messages"][1]
    assert json.loads(call["tool_calls"]) == [{"id": "1", **CALL}]
    assert call["reasoning_content"] == "t"
    assert conversation["messages"][2]["tool_call_id"] == "1"
    assert json.loads(conversation["tools"]) == DESCRIBED


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("messages", {"messages": [{"role": "user", "content": [{"image": {"format": "png"}}]}]}),
        ("gemini", {"contents": [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}]}),
        ("chatgpt_export", {"current_node": "a", "mapping": {"a": {"message": {
            "author": {"role": "user"}, "content": {"content_type": "multimodal_text", "parts": [{}]}}}}}),
    ],
    ids=["bedrock", "gemini", "chatgpt"],
)  # fmt: skip
def test_pictures_are_refused(name, record):
    assert refusal(name, record)[0] == "unsupported_content"
