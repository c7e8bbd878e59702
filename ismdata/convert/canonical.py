"""The general road's second half: a draft becomes a canonical row, or is refused with a reason.

Plain Python, one record at a time. It is the oracle for `columnar.py` and takes every record that file leaves aside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.conversation import ROLE_NAMES, ROLES, TOOL_CALL_ROLE_NAMES
from ismdata.convert.corpus_format import Draft, kind_of
from ismdata.convert.training_flags import refuse_flags, train_flag
from ismdata.errors import Refused, UsageError, shown

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
#: Record fields that hold what is no text: without it the messages are half of the conversation.
MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
_REASONING_PARTS = frozenset({"reasoning", "thinking"})


def role_table(extra: Mapping[str, str]) -> dict[str, str]:
    """Role names in lower case to canonical roles: the usual ones, overridden by `extra`. Raises UsageError."""
    table = dict(ROLE_NAMES)
    for name, role in extra.items():
        if role not in ROLES:
            raise UsageError(f"--role {name}={role}: {role!r} is no role; expected one of {', '.join(ROLES)}")
        table[name.lower()] = role
    return table


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What both roads do alike with all formats.

    `roles` maps role names in lower case to canonical roles. `join` makes one message of several that one side sends in
    a row, a line break between them.
    """

    roles: Mapping[str, str]
    join: bool = False


def canonicalize(draft: Draft, rules: Rules) -> dict[str, Any]:
    """The row of `conversation.CONVERSATION_SCHEMA` without its `source`; `id` may be None. Raises Refused."""
    if not draft.messages:
        raise Refused("no_messages", "the conversation has no messages")
    for name in MEDIA_FIELDS:
        if draft.extra.get(name):
            raise Refused("unsupported_content", f"the record has {name}; expected text only")
    refuse_flags(draft.ignored)
    messages = [_message(raw, number, rules.roles) for number, raw in enumerate(draft.messages, 1)]
    row = {
        "id": None if draft.id is None else str(draft.id),
        "messages": messages,
        "tools": _tools(draft.tools),
        "meta": meta_json(draft.extra),
    }
    for number, message in enumerate(messages, 1):
        for name, value in message.items():
            _check_text(value, f"message {number}'s {name}")
    if rules.join:
        row["messages"] = joined(messages)
    for name in ("id", "tools", "meta"):
        _check_text(row[name], f"the record's {name}")
    return row


#: Roles whose messages in a row can be one.
JOINED_ROLES = ("user", "assistant")


def joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that one side sends in a row as one, where they differ in their text alone; tool calls stay apart."""
    result: list[dict[str, Any]] = []
    for message in messages:
        last = result[-1] if result else None
        if last is not None and message["role"] in JOINED_ROLES and not message["tool_calls"] and _alike(last, message):
            result[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            result.append(message)
    return result


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in one if name != "content")


def _message(raw: Mapping[str, Any], number: int, roles: Mapping[str, str]) -> dict[str, Any]:
    name = raw.get("role")
    if name is None:
        raise Refused("missing_role", f"message {number} has no role; expected {_expected_roles()}")
    if not isinstance(name, str):
        raise Refused("invalid_field", f"message {number} has role {shown(name)}; expected a string")
    role = roles.get(name.lower())
    text, calls, reasoning = _content(raw.get("content"), number)
    if role is None and name.lower() in TOOL_CALL_ROLE_NAMES:
        role, calls, text = "assistant", _calls_of_text(text, number), None
    if role is None:
        fix = f"Map it with --role {name}=assistant"
        raise Refused("unknown_role", f"message {number} has role {shown(name)}; expected {_expected_roles()}. {fix}.")
    calls = calls + _calls_of_message(raw, number)
    if text is None and not calls:
        raise Refused("missing_content", f"message {number} ({role}) has neither content nor tool calls")
    if role == "assistant" and not calls and not (text and text.strip()):
        raise Refused("empty_answer", f"message {number} (assistant) is empty and calls no tool")
    return {
        "role": role,
        "content": text,
        "train": train_flag(raw, number),
        "weight": _weight(raw.get("weight"), number),
        "name": _string(raw, "name", number),
        "tool_calls": json_text(calls, f"message {number}'s tool calls") if calls else None,
        "tool_call_id": _string(raw, "tool_call_id", number),
        "reasoning_content": _string(raw, "reasoning_content", number) or reasoning,
    }


def _expected_roles() -> str:
    return f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"


def _content(value: Any, number: int) -> tuple[str | None, list[dict[str, Any]], str | None]:
    """Text, tool calls and reasoning of a message's content, which is text, null or a list of typed parts."""
    if value is None or isinstance(value, str):
        return value, [], None
    if not isinstance(value, list):
        found = f"message {number}'s content is {kind_of(value)}"
        raise Refused("invalid_content", f"{found}; expected a string or a list of text parts")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            found = f"message {number}'s content has the part {shown(part)}"
            raise Refused("invalid_content", f"{found}; expected an object with a type, such as {{'type': 'text', …}}")
        body = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
        if kind == "tool_call":
            calls += _calls_of_value(body, number)
        elif kind not in _TEXT_PARTS | _REASONING_PARTS:
            raise Refused("unsupported_content", f"message {number} has a part of type {kind!r}; expected text only")
        elif not isinstance(body, str):
            raise Refused("invalid_content", f"message {number}'s {kind} part holds {kind_of(body)}; expected a string")
        else:
            (texts if kind in _TEXT_PARTS else reasoning).append(body)
    text = None if calls and not texts else "".join(texts)
    return text, calls, "".join(reasoning) if reasoning else None


def _calls_of_message(raw: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    calls = raw.get("tool_calls")
    found = [] if calls is None or calls == "" else _calls_of_value(calls, number)
    if raw.get("function_call") is not None:
        found += _calls_of_value(raw["function_call"], number)
    return found


def _calls_of_text(text: str | None, number: int) -> list[dict[str, Any]]:
    calls = _calls_of_value(text, number)
    if not calls:
        raise Refused("invalid_tool_call", f"message {number} calls no tool; expected {_EXPECTED_CALL}")
    return calls


_EXPECTED_CALL = 'a JSON object such as {"name": …, "arguments": {…}}'


def _calls_of_value(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls given as an object, a list of them, or the JSON text of either."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            found = f"message {number}'s tool call is {shown(value)} ({error})"
            raise Refused("invalid_tool_call", f"{found}; expected {_EXPECTED_CALL}") from error
    return [_call(call, number) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise Refused("invalid_tool_call", f"message {number}'s tool call is {shown(call)}; expected {_EXPECTED_CALL}")
    arguments = function.get("arguments")
    head = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    # An object or its JSON text, as the corpus has it: who renders them for a template parses the text.
    return {**head, "type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}


def _tools(value: Any) -> str | None:
    """The JSON text of an OpenAI-style list of tool descriptions, or None where there are none."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError as error:
            raise Refused("invalid_tools", f"tools is not JSON text ({error}); expected a list") from error
    if value is None or value == []:
        return None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("invalid_tools", f"tools is {shown(value)}; expected a list of objects")
    whole = [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]
    return json_text(whole, "tools")


def meta_json(extra: Mapping[str, Any]) -> str | None:
    """The JSON text of what else a record holds, nulls left out, or None. Raises Refused."""
    held = {name: value for name, value in extra.items() if value is not None}
    return json_text(held, "the record's other fields") if held else None


#: Weights are stored as float32 in shards.
MAX_WEIGHT = 3.4e38


def _weight(value: Any, number: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            weight = float(value)
        except OverflowError:
            weight = math.inf
        if 0 <= weight <= MAX_WEIGHT:
            return weight
    raise Refused(
        "invalid_field", f"message {number} has weight {shown(value)}; expected a number from 0 up, finite as float32"
    )


def _string(raw: Mapping[str, Any], name: str, number: int) -> str | None:
    value = raw.get(name)
    if value is None or isinstance(value, str):
        return value
    raise Refused("invalid_field", f"message {number} has {name} {shown(value)}; expected a string")


def _check_text(value: Any, where: str) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{where} holds half a surrogate pair, \\u{ord(value[error.start]):04x}"
            raise Refused("lone_surrogate", f"{found}; expected text that UTF-8 can hold") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
#: What is deeper is refused. Python's own limit counts all calls that are open: it would depend on who asks, and what
#: was read could not be written again.
MAX_DEPTH = 800
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def parse_json(text: str) -> Any:
    """Strict JSON, without NaN and Infinity. Raises ValueError for what cannot be read, too deep nesting included."""
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and exceeds_depth(value):
        raise ValueError(_TOO_DEEP)
    return value


def exceeds_depth(value: Any) -> bool:
    """Whether a JSON value is nested more than MAX_DEPTH levels deep.

    >>> exceeds_depth([[1]])
    False
    """
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_DEPTH):
        values = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in values if isinstance(inner, list | dict)]
        if not level:
            return False
    return True


def json_text(value: Any, where: str) -> str:
    """Compact JSON that stays readable. Raises Refused for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_field", f"{where}: {error}; expected values that JSON can hold") from error
