"""Canonical conversations to the messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ismdata.rendering.chat_template import Message
from ismdata.rendering.refusals import InvalidArguments

#: Fields of a message that only a rendering of the conversation by itself takes into account.
SPECIAL_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def as_template_messages(conversation: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """A canonical conversation as templates take it: tool calls and tools parsed, training marks left out.

    Raises InvalidArguments.
    """
    messages = []
    for number, message in enumerate(conversation["messages"], 1):
        shaped = {key: message[key] for key in ("role", "content", *SPECIAL_FIELDS) if message.get(key) is not None}
        if "tool_calls" in shaped:
            shaped["tool_calls"] = _load(shaped["tool_calls"], f"message {number}: the tool calls")
            for call in shaped["tool_calls"]:
                _parse_arguments(call, number)
        shaped.setdefault("content", None)  # templates ask `content is none`
        messages.append(shaped)
    tools = conversation.get("tools")
    return messages, _load(tools, "the conversation's tools") if tools else None


def _load(text: str, what: str) -> Any:
    """The JSON of a stored field. Raises InvalidArguments."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArguments(f"{what} are not JSON ({error}): {text[:80]!r}; expected a JSON list") from error


def _parse_arguments(call: dict[str, Any], number: int) -> None:
    """Put the arguments of a call in as an object, which templates expect; none at all are an empty one.

    number: that of the message, for the error. Raises InvalidArguments for text that is not JSON: a model would learn
    to write it. JSON that is no object stays as its text.
    """
    function = call.get("function")
    if not isinstance(function, dict):
        return
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        function["arguments"] = {}
    elif isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError as error:
            raise InvalidArguments(
                f"message {number} calls the tool {function.get('name')!r} with arguments that are not JSON ({error}): "
                f"{arguments[:80]!r}; expected a JSON object as text"
            ) from error
        if isinstance(parsed, dict):
            function["arguments"] = parsed
