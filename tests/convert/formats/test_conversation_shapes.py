"""Shapes of dialogue data that need more than a list of turns to say what they become: tools, branches, battles."""

from __future__ import annotations

import json

import pytest

from ismdata.convert.formats.registry import FORMATS, detect
from tests.convert.formats.test_formats import conversations, read, refusal, said
from tests.support.shapes import BATTLE, EXPORT, QA, A, Q, R, T, U, spoken

# ---- tools in the shapes of the APIs ----

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
    assert said(conversation) == [(U, "q"), (A, "See."), (T, "14"), (U, "Well?"), (A, "14.")]
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


def test_the_last_answer_has_the_whole_dialogue_before_it():
    first = {"history": ["a"], "candidates": ["x", "b"]}
    last = {"history": ["a", "b", "c"], "candidates": ["y", "d"]}
    (conversation,) = conversations("convai", {"utterances": [first, last]})
    assert said(conversation) == [(U, "a"), (A, "b"), (U, "c"), (A, "d")]
    broken = {"utterances": [first, {**last, "history": ["a", "z", "c"]}]}
    assert refusal("convai", broken)[0] == "broken_tree"


def test_only_the_branch_on_the_screen_is_read_and_the_others_are_counted():
    (draft,) = FORMATS["chatgpt_export"].parse_record(EXPORT)
    assert list(draft.ignored) == ["messages of other branches"]
    ring = {"current_node": "a", "mapping": {"a": {"message": None, "parent": "b"}, "b": {"parent": "a"}}}
    assert refusal("chatgpt_export", ring)[0] == "broken_tree"
    assert refusal("chatgpt_export", {"current_node": "x", "mapping": {}})[0] == "broken_tree"


def test_a_battle_that_no_one_won_has_no_better_side():
    reason, detail = refusal("preference", {**BATTLE, "winner": "tie"}, preference="chosen")
    assert reason == "no_preference" and "'tie'" in detail
    assert read("preference", {**BATTLE, "winner": "model_b"}, preference="rejected") == [[(U, Q), (A, "No.")]]


def test_calls_in_glaives_texts():
    text = "USER: n?\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\nFUNCTION RESPONSE: 14\n\n\nASSISTANT: 14"
    call = """{"name": "f", "arguments": '{"a": "it's"}'}"""
    (conversation,) = conversations("separated", {"chat": text.replace("{}", call)})
    assert said(conversation) == [(U, "n?"), (A, None), (T, "14"), (A, "14")]
    (found,) = json.loads(conversation["messages"][1]["tool_calls"])
    assert found["function"] == {"name": "f", "arguments": '{"a": "it\'s"}'}
    assert refusal("separated", {"chat": text.replace("{}", "{broken")})[0] == "invalid_tool_call"


def test_a_prompt_that_holds_the_dialogue_so_far():
    record = {"instruction": "Human:a\nAssistant:b\nHuman:c\nAssistant:", "input": "", "output": "d"}
    assert read("alpaca", record) == [[(U, "a"), (A, "b"), (U, "c"), (A, "d")]]
    for other in ("Complete:\nHuman:a\nAssistant:", "Human:a\nHuman:b\nAssistant:", "Human:a\nAssistant:b"):
        assert read("alpaca", {**record, "instruction": other}) == [[(U, other), (A, "d")]]


def test_an_input_beside_an_output_is_a_prompt():
    record = {"input": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "output": "d"}
    assert detect(record) == "prompt_completion"


def test_commas_of_empathetic_dialogues():
    row = {
        "conv_id": "c",
        "utterance_idx": "1",
        "context": "x",
        "prompt": "y",
        "speaker_idx": "3",
        "utterance": "a_comma_ b",
    }
    assert detect(row) == "dialogue_rows"
    (draft,) = FORMATS["dialogue_rows"].parse_record(
        [row, {**row, "utterance_idx": "2", "speaker_idx": "0", "utterance": "c"}]
    )
    assert [(one["role"], one["content"]) for one in draft.messages] == [(U, "a, b"), (A, "c")]


def test_numbers_before_names_go_only_where_names_stay_different():
    assert read("utterances", {"dialog": spoken("speaker", "text", ("1_agent", Q), ("2_agent", R))}) == [QA]
