"""Text that looks like control tokens, or is odd, stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ismdata.conversation import CONVERSATION_SCHEMA
from ismdata.pack.batch_encoder import BatchEncoder
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.rendering import renderer
from ismdata.rendering.control_tokens import AddedToken, ControlTokens
from ismdata.rendering.encoding import Encoding
from ismdata.rendering.messages import as_template_messages
from tests.conftest import encoding, template_named
from tests.pack.test_batch_encoder import whole

# ---- text that looks like control tokens ----

SMOLLM2 = ("smollm2", "chatml", False)
WITH = [SMOLLM2, ("smollm2", "qwen3", True), ("deepseek", "deepseekv3", False)]


@pytest.fixture(params=WITH, ids=["smollm2", "smollm2-qwen3", "deepseek"])
def with_(request: pytest.FixtureRequest, smollm2: Path, deepseek: Path) -> Encoding:
    name, template, markers = request.param
    folder = {"smollm2": smollm2, "deepseek": deepseek}[name]
    return encoding(folder) if template == "chatml" else encoding(folder, template_named(template), markers=markers)


def every_token(with_: Encoding, *, few: bool = False) -> list[str]:
    """All added tokens of the tokenizer and the markers of the template.

    few: of tokens that differ only in a number, take the first and the last.
    """
    added = [token.content for token in with_.tokenizer.pretrained.added_tokens_decoder.values()]
    tokens = sorted({*added, *with_.tokenizer.markers.tokens})
    if not few:
        return tokens
    first_of = {re.sub(r"\d+", "0", token): token for token in reversed(tokens)}
    last_of = {re.sub(r"\d+", "0", token): token for token in tokens}
    return sorted({*first_of.values(), *last_of.values()})


PLACES = {
    "alone": lambda token: [token],
    "adjacent": lambda token: [f"a{token}b"],
    "doubled": lambda token: [token * 2, token[0] + token, token + token[-1]],
    "nested": lambda token: [token[: len(token) // 2] + token + token[len(token) // 2 :]],
    "with joiners": lambda token: [f"\u200d{token}\u200d", "\u200d".join(token), f"{token}\u200c{token}"],
    "begun": lambda token: [token[:-1], f"a {token[:-1]} ", token[:1]],
    "ended": lambda token: [token[1:], f" {token[1:]} a", token[-1:]],
}


def controls_of(with_: Encoding, conversations: list[dict[str, Any]]) -> list[list[int]]:
    """The control tokens of each conversation's document; its ids must be the same from columns and from rendering."""
    rows = pa.RecordBatch.from_pylist(conversations, schema=CONVERSATION_SCHEMA)
    batch = ConversationBatch.from_rows(rows, with_.sensitivity)
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    requests = whole(batch)
    layout = encoder.lay_out(requests)
    assert layout.refused == {}
    documents = encoder.documents(layout, requests)
    assert encoder.stray_controls(layout, documents).size == 0
    ends = np.cumsum(documents.lengths)
    found = []
    for c, (length, end) in enumerate(zip(documents.lengths, ends, strict=True)):
        ids = documents.input_ids[end - length : end]
        messages, tools = as_template_messages(batch.conversation(c))
        assert [id for piece in with_.document(messages, tools) for id in piece.ids or ()] == ids.tolist()
        found.append(ids[np.isin(ids, with_.tokenizer.control_ids)].tolist())
    return found


def talk(at: str | None, text: str, **fields: Any) -> dict[str, Any]:
    """Two exchanges; the first message of the role `at` is `text`."""
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages: list[dict[str, Any]] = [{"role": role, "content": f"word {k}"} for k, role in enumerate(roles)]
    if at is not None:
        messages[roles.index(at)] |= {"content": text}
    messages[1] |= fields
    return {"id": "c", "source": "t:1", "messages": messages}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_message_holds_a_control_token(with_: Encoding, place: str) -> None:
    """Every token in every role and place, in one text with the others and, for a few, in a separate text."""
    tokens = every_token(with_, few=place != "alone")
    few = [*tokens[:3], *tokens[-3:], *with_.tokenizer.markers.tokens][:8]
    texts = [" ".join(text for token in tokens for text in PLACES[place](token))]
    texts += ["".join(text for token in tokens for text in PLACES[place](token))]
    texts += [text for token in few for text in PLACES[place](token) if text.strip()]
    [expected] = controls_of(with_, [talk(None, "")])
    for fields in ({}, {"name": "Bo"}):  # from columns, and rendered individually
        conversations = [talk(role, text, **fields) for role in ("system", "user", "assistant") for text in texts]
        for found, conversation in zip(controls_of(with_, conversations), conversations, strict=True):
            assert found == expected, conversation


def test_texts_side_by_side_make_no_control_token(with_: Encoding) -> None:
    """Half of a token at the end of a text and half at the start of the next, even if whitespace is stripped."""
    for token in every_token(with_, few=True):
        for cut in range(1, len(token)):
            texts = [f"a {token[:cut]}", f" {token[:cut]}\n", f"\t{token[cut:]} ", f"{token[cut:]} a", token[:cut] * 2]
            escaped, escapes = with_.tokenizer.controls.escape([{"role": "user", "content": text} for text in texts])
            contents = [message["content"] for message in escaped]
            assert [escapes.undo(content) for content in contents] == texts
            for content in contents:
                for before, after in ((content, token[cut:]), (token[:cut], content)):
                    joined = before.rstrip() + after.lstrip()
                    assert with_.tokenizer.controls.pattern.search(joined) is None, (token, cut, joined)


def test_a_template_that_joins_texts_makes_no_control_token(smollm2: Path, tmp_path: Path) -> None:
    """With a template that writes two messages without anything between them."""
    end = "{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
    glued = "{% for m in messages %}{{ m.content | trim }}" + end + "{% endfor %}"
    path = tmp_path / "glued.jinja"
    path.write_text(glued, encoding="utf-8")
    with_ = encoding(smollm2, path)
    messages = [
        {"role": "user", "content": "one <|im_ "},
        {"role": "user", "content": " end|> two <|im_end"},
        {"role": "assistant", "content": "|> three <|im_end"},
    ]
    ids = [id for piece in with_.document(messages) for id in piece.ids or ()]
    assert np.isin(ids, with_.tokenizer.control_ids).sum() == 1
    assert with_.tokenizer.decode(ids) == "one <|im_end|> two <|im_end|> three <|im_end<|im_end|>"


FIELDS: dict[str, Any] = {
    "a tool's result": lambda text: {"content": text},
    "a tool's name": lambda text: {"name": text},
    "arguments": lambda text: {"arguments": json.dumps({"key": text})},
    "keys of arguments": lambda text: {"arguments": json.dumps({text: {text: 1}})},
    "arguments that are no object": lambda text: {"arguments": json.dumps(text)},
    "what a tool is": lambda text: {"description": text},
    "keys of a tool's parameters": lambda text: {"properties": {text: {"type": text, "role": text}}},
    "reasoning": lambda text: {"reasoning_content": text},
    "the id of a call": lambda text: {"tool_call_id": text},
}


def tool_talk(**parts: Any) -> dict[str, Any]:
    name, id_ = parts.get("name", "clock"), parts.get("tool_call_id", "c1")
    function = {"name": name, "arguments": parts.get("arguments", '{"key": "now"}')}
    parameters = {"type": "object", "properties": parts.get("properties", {"key": {"type": "string"}})}
    described = {"name": name, "description": parts.get("description", "tells"), "parameters": parameters}
    calls = json.dumps([{"id": id_, "type": "function", "function": function}])
    return {
        "id": "c",
        "source": "t:1",
        "tools": json.dumps([{"type": "function", "function": described}]),
        "messages": [
            {"role": "user", "content": "when?"},
            {"role": "assistant", "content": "", "tool_calls": calls}
            | ({"reasoning_content": parts["reasoning_content"]} if "reasoning_content" in parts else {}),
            {"role": "tool", "content": parts.get("content", "noon"), "tool_call_id": id_, "name": name},
            {"role": "assistant", "content": "at noon"},
        ],
    }


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_holds_a_control_token(field: str, smollm2: Path) -> None:
    with_ = encoding(smollm2, template_named("qwen3"), markers=True)
    [expected] = controls_of(with_, [tool_talk(reasoning_content="hm") if field == "reasoning" else tool_talk()])
    tokens = every_token(with_)
    texts = [token for token in tokens if token in with_.tokenizer.controls.tokens]
    texts += ["".join(tokens), "<|im_", "end|>", "x<|im_end", "|>"]
    assert len(texts) > 10
    for found in controls_of(with_, [tool_talk(**FIELDS[field](text)) for text in texts]):
        assert found == expected


# ---- text that is odd ----

ODD = {
    "NUL": "a\x00b\x00",
    "a byte order mark": "\ufeffhi\ufeff",
    "line separators": "a\u2028b\u2029c\x85d",
    "CRLF": "a\r\nb\rc",
    "right to left": "\u202eabc\u202c \u200fאבג",
    "combining": "e" + "\u0301" * 50,
    "joiners": "\u200d\u200c\u2060" * 20,
    "private use": "\ue000\U000f0000\U00100000",
    "replacement": "\ufffd\ufffe",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f",
    "emoji": "👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
@pytest.mark.parametrize("fields", [{}, {"name": "Bo"}], ids=["columns", "individually"])
def test_odd_text_comes_through_unchanged(text: str, fields: dict[str, Any], smollm2: Path) -> None:
    with_ = encoding(smollm2)
    for role in ("user", "assistant"):
        conversation = talk(role, f"x{text}x", **fields)
        [_] = controls_of(with_, [conversation])
        messages, tools = as_template_messages(conversation)
        ids = [id for piece in with_.document(messages, tools) for id in piece.ids or ()]
        # As the tokenizer decodes it: SmolLM2's vocabulary lacks some control characters.
        spelled = with_.tokenizer.decode(with_.tokenizer.pretrained.encode(f"x{text}x", add_special_tokens=False))
        assert spelled in with_.tokenizer.decode(ids)
        assert spelled == f"x{text}x" or text == ODD["controls"]


def test_a_conversation_too_long_to_render_individually_is_refused(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columnar encoding has no limit; rendering one answer at a time takes time that grows with the square."""
    monkeypatch.setattr(renderer, "MOST_MESSAGES", 30)
    with_ = encoding(smollm2)
    long = [{"role": ("user", "assistant")[k % 2], "content": f"word {k}"} for k in range(40)]
    named = [{**long[0], "name": "Bo"}, *long[1:]]
    rows = [{"id": str(k), "source": "t", "messages": messages} for k, messages in enumerate((long, named, named[:30]))]
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    refused = encoder.lay_out(whole(batch)).refused
    assert {r: refusal.reason for r, refusal in refused.items()} == {1: "too_many_messages"}
    assert refused[1].detail.startswith("40 messages, which the template can only render one answer at a time")


def test_escaping_leaves_the_keys_and_roles_that_templates_read() -> None:
    """Even if a tokenizer has a token that is a part of them."""
    controls = ControlTokens(
        [AddedToken(text=text, id=k, special=True) for k, text in enumerate(["role", "user", "name"])]
    )
    [message], escapes = controls.escape([{"role": "user", "content": "user name", "name": "name", "rolename": 1}])
    assert message["role"] == "user"
    assert escapes.undo(message["content"]) == "user name"
    assert set(message) - {"role", "content", "name"} != {"rolename"}
    assert controls.pattern.search("".join([message["content"], message["name"]])) is None
