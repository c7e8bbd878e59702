"""The general path: a draft becomes a canonical row, or is refused with a reason.

Plain Python, one conversation at a time. These rules are the reference for the fast path (`columnar.py`), which applies
them to whole columns and leaves every conversation to this module that it cannot decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ismdata.choices import Preference
from ismdata.conversation import ROLE_NAMES, ROLES, TOOL_CALL_ROLE_NAMES
from ismdata.convert.answer_labels import check_labels
from ismdata.convert.corpus_format import Draft, kind_of
from ismdata.convert.json_values import json_text, without_nan
from ismdata.convert.tool_calls import (
    argument_schemas,
    calls_of_message,
    calls_of_text,
    calls_of_value,
    described_tools,
    without_null_arguments,
)
from ismdata.convert.training_flags import refuse_flags, train_flag
from ismdata.errors import Refused, UsageError, shown

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
#: Record fields with images, video or audio: without these the messages are only half of the conversation.
MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
_REASONING_PARTS = frozenset({"reasoning", "thinking"})


def role_table(extra: Mapping[str, str]) -> dict[str, str]:
    """The canonical role of each known role name.

    Args:
        extra: Role names to canonical roles, in addition to ROLE_NAMES; they override it.

    Returns:
        Role names in lower case to canonical roles.

    Raises:
        UsageError: If `extra` maps a name to something else than a canonical role.

    Example:
        >>> role_table({"Clerk": "assistant"})["clerk"]
        'assistant'
    """
    table = dict(ROLE_NAMES)
    for name, role in extra.items():
        if role not in ROLES:
            raise UsageError(f"--role {name}={role}: {role!r} is not a role; expected one of {', '.join(ROLES)}")
        table[name.lower()] = role
    return table


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules that both paths apply to all formats.

    Attributes:
        roles: Role names in lower case to canonical roles.
        join: Whether to merge consecutive messages of the same role, with a line break between them.
        preference: Which answers are read, if their records label them as good or bad; None reads the good ones.
    """

    roles: Mapping[str, str]
    join: bool = False
    preference: Preference | None = None


def canonicalize(draft: Draft, rules: Rules, ignored: list[str] | None = None) -> dict[str, Any]:
    """Turn a draft into a canonical conversation.

    Args:
        draft: The conversation as its format parsed it.
        rules: The rules that all formats share.
        ignored: Receives names of what is left out beside the draft's `ignored`, such as null arguments of tool calls.

    Returns:
        A row of `conversation.CONVERSATION_SCHEMA` without its `source`. Its `id` is None if the draft has none.

    Raises:
        Refused: If the conversation breaks a rule. The reason is a key of `conversation.REASONS`.
    """
    if not draft.messages:
        raise Refused("no_messages", "the conversation has no messages")
    for name in MEDIA_FIELDS:
        if draft.extra.get(name):
            raise Refused("unsupported_content", f"the record has {name}; expected text only")
    refuse_flags(draft.ignored)
    check_labels(draft.extra, rules.preference)
    ignored = [] if ignored is None else ignored
    tools = described_tools(draft.tools, ignored)
    calls = _Calls(schemas=argument_schemas(tools), ignored=ignored)
    messages = [_message(raw, number, rules.roles, calls) for number, raw in enumerate(draft.messages, 1)]
    row = {
        "id": None if draft.id is None else str(draft.id),
        "messages": messages,
        "tools": json_text(tools, "tools") if tools else None,
        "meta": meta_json(draft.extra),
    }
    for number, message in enumerate(messages, 1):
        for name, value in message.items():
            _check_text(value, f"message {number}'s {name}")
    if rules.join:
        row["messages"] = join_messages(messages)
    for name in ("id", "tools", "meta"):
        _check_text(row[name], f"the record's {name}")
    return row


#: Roles whose consecutive messages are merged by `Rules.join`.
JOINED_ROLES = ("user", "assistant")


def join_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge consecutive messages that differ only in their content. Messages with tool calls are not merged."""
    result: list[dict[str, Any]] = []
    for message in messages:
        last = result[-1] if result else None
        joinable = message["role"] in JOINED_ROLES and not message["tool_calls"]
        if last is not None and joinable and _differ_in_content_only(last, message):
            result[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            result.append(message)
    return result


def _differ_in_content_only(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in one if name != "content")


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """What tool calls need: the schemas of their arguments, and the list of what is left out."""

    schemas: Mapping[str, Any]
    ignored: list[str]


def _message(raw: Mapping[str, Any], number: int, roles: Mapping[str, str], described: _Calls) -> dict[str, Any]:
    """A canonical message, with all fields of `conversation.MESSAGE_TYPE`."""
    name = raw.get("role")
    if name is None:
        raise Refused("missing_role", f"message {number} has no role; expected {_expected_roles()}")
    if not isinstance(name, str):
        raise Refused("invalid_field", f"message {number} has role {shown(name)}; expected a string")
    role = roles.get(name.lower())
    text, calls, reasoning = _content(raw.get("content"), number)
    if role is None and name.lower() in TOOL_CALL_ROLE_NAMES:
        role, calls, text = "assistant", calls_of_text(text, number), None
    if role is None:
        fix = f"Map it with --role {name}=assistant"
        raise Refused("unknown_role", f"message {number} has role {shown(name)}; expected {_expected_roles()}. {fix}.")
    calls = calls + calls_of_message(raw, number)
    calls = [without_null_arguments(call, described.schemas, described.ignored) for call in calls]
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
    """Text, tool calls and reasoning in a message's content, which is a string, null or a list of typed parts."""
    if value is None or isinstance(value, str):
        return value, [], None
    if not isinstance(value, list):
        found = f"message {number}'s content is {kind_of(value)}"
        raise Refused("invalid_content", f"{found}; expected a string or a list of text parts")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    if len(value) > 1 and all(isinstance(part, str) for part in value):
        return join_texts(value), [], None
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
            calls += calls_of_value(body, number)
        elif kind not in _TEXT_PARTS | _REASONING_PARTS:
            raise Refused("unsupported_content", f"message {number} has a part of type {kind!r}; expected text only")
        elif not isinstance(body, str):
            raise Refused(
                "invalid_content", f"message {number}'s {kind} part contains {kind_of(body)}; expected a string"
            )
        else:
            (texts if kind in _TEXT_PARTS else reasoning).append(body)
    text = None if calls and not texts else "".join(texts)
    return text, calls, "".join(reasoning) if reasoning else None


def join_texts(texts: Sequence[str]) -> str:
    """Pieces of one text, with a line break between two of which neither has whitespace there.

    >>> join_texts(["One.", "Two. ", "Three."])
    'One.\\nTwo. Three.'
    """
    joined = "".join(texts[:1])
    for before, text in pairwise(texts):
        apart = not before or not text or before[-1].isspace() or text[0].isspace()
        joined += text if apart else f"\n{text}"
    return joined


def meta_json(extra: Mapping[str, Any]) -> str | None:
    """The JSON text of a record's other fields without nulls; NaN is null. None if there are none. Raises Refused."""
    where = "the record's other fields"
    present = {name: value for name, value in extra.items() if value is not None}
    try:
        return json_text(present, where) if present else None
    except Refused:  # perhaps a number that is not finite: null, as in records that write it as NaN
        finite = {name: value for name, value in without_nan(present, used=frozenset()).items() if value is not None}
        return json_text(finite, where) if finite else None


#: The largest weight: packed shards store weights as float32.
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
        "invalid_field",
        f"message {number} has weight {shown(value)}; expected a number of at least 0 and at most {MAX_WEIGHT:g}",
    )


def _string(raw: Mapping[str, Any], name: str, number: int) -> str | None:
    value = raw.get(name)
    if value is None or isinstance(value, str):
        return value
    raise Refused("invalid_field", f"message {number} has {name} {shown(value)}; expected a string")


def _check_text(value: Any, where: str) -> None:
    """Raise Refused if a string cannot be encoded as UTF-8."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{where} contains half a surrogate pair, \\u{ord(value[error.start]):04x}"
            raise Refused("lone_surrogate", f"{found}; expected text that UTF-8 can encode") from error
