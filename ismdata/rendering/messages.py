"""Canonical conversations to the messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ismdata.rendering.chat_template import Message
from ismdata.rendering.refusals import InvalidArguments

#: Fields of a message that a skeleton cannot express: conversations with one of them are rendered individually.
SPECIAL_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def as_template_messages(conversation: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """Convert a canonical conversation to what templates take.

    Tool calls and tools are parsed; fields about training are left out.

    Args:
        conversation: A row of `conversation.CONVERSATION_SCHEMA`. Fields that are null may be missing.

    Returns:
        The messages, and the tools; None if there are no tools.

    Raises:
        InvalidArguments: If the arguments of a tool call, the tool calls or the tools are not JSON.
    """
    messages = []
    for number, message in enumerate(conversation["messages"], 1):
        shaped = {key: message[key] for key in ("role", "content", *SPECIAL_FIELDS) if message.get(key) is not None}
        if "tool_calls" in shaped:
            shaped["tool_calls"] = _load(shaped["tool_calls"], f"message {number}: the tool calls")
            for call in shaped["tool_calls"]:
                _parse_arguments(call, number)
        shaped.setdefault("content", None)  # templates test `content is none`
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
    """Replace the text of a call's arguments by the object that templates expect; no arguments become an empty object.

    JSON that is no object stays text. Text that is not JSON raises InvalidArguments: a model would learn to write it.
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
