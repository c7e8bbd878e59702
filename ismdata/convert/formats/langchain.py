"""Messages as LangChain stores them, in `type` and `data`, in constructors, or as plain fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, take_id
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.messages import OPENAI
from ismdata.errors import Refused, shown

#: The types of messages, and the beginnings of the names of their classes.
_TYPES = ("human", "ai", "system", "tool", "function", "developer", "chat")
#: Fields of a message that are read.
_READ = frozenset({"type", "content", "tool_calls", "tool_call_id", "name", "additional_kwargs", "role"})


@dataclass(frozen=True, kw_only=True)
class LangChain(CorpusFormat):
    """A record is an object whose `messages` are LangChain's, or such a list."""

    expects: str = "messages[].type/data.content, as LangChain stores chats"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        listed = record.get("messages") if isinstance(record, dict) else record
        return isinstance(listed, list) and bool(listed) and is_langchain(listed[0])

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = {"messages": record} if isinstance(record, list) else dict(fields_of(record))
        listed = fields.pop("messages", None)
        if not isinstance(listed, list):
            raise missing_field(fields, "'messages'")
        ignored: list[str] = []
        messages = [openai_message(one, ignored) for one in listed]
        (draft,) = OPENAI.parse_record({"messages": messages})
        tools = fields.pop("tools", None)
        return [Draft(messages=draft.messages, id=take_id(fields), tools=tools, extra=fields, ignored=ignored)]


def is_langchain(message: Any) -> bool:
    """Whether a value is a message of LangChain."""
    body = _body(message)
    return body is not None and "content" in body


def openai_message(message: Any, ignored: list[str]) -> Any:
    """A message of LangChain as one of OpenAI; anything else unchanged. Adds what is left out to `ignored`.

    >>> openai_message({"type": "ai", "data": {"content": "Hi"}}, [])
    {'role': 'ai', 'content': 'Hi'}
    """
    body = _body(message)
    if body is None:
        return message
    more = body.get("additional_kwargs")
    more = more if isinstance(more, dict) else {}
    found = {"role": body["role"] if body["type"] == "chat" else body["type"], "content": body.get("content")}
    calls = body.get("tool_calls")
    if calls:
        found["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    elif more.get("tool_calls") or more.get("function_call"):
        found |= {name: more[name] for name in ("tool_calls", "function_call") if more.get(name)}
    if found["content"] in ("", []) and ("tool_calls" in found or "function_call" in found):
        found["content"] = None
    content = found["content"]
    if isinstance(content, list):  # calls are in `tool_calls` too
        found["content"] = [
            part for part in content if not (isinstance(part, dict) and part.get("type") == "tool_use")
        ] or None
    for name in ("tool_call_id", "name"):
        if isinstance(body.get(name), str):
            found[name] = body[name]
    ignored += [f"messages[].data.{name}" for name, value in body.items() if name not in _READ and value]
    if body.get("artifact"):
        raise Refused(
            "unsupported_content", f"a message has the artifact {shown(body['artifact'])}; expected text only"
        )
    return found


def _body(message: Any) -> dict[str, Any] | None:
    """The fields of a message with its `type`, None if it is no message of LangChain."""
    if not isinstance(message, dict):
        return None
    if isinstance(message.get("data"), dict) and message.get("type") in _TYPES:
        return _typed(message["data"], message["type"])
    if message.get("type") == "constructor" and isinstance(message.get("kwargs"), dict):
        path = message.get("id")
        name = path[-1] if isinstance(path, list) and path and isinstance(path[-1], str) else ""
        kind = next((kind for kind in _TYPES if name.lower().startswith(f"{kind}message")), None)
        return None if kind is None else _typed(message["kwargs"], kind)
    if message.get("type") in _TYPES and "content" in message and "role" not in message:
        return _typed(message, message["type"])
    return None


def _typed(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"role": None, **body, "type": kind}


def _call(call: Any) -> Any:
    """A tool call, whose arguments LangChain calls `args`."""
    if not isinstance(call, dict) or "args" not in call:
        return call
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": call.get("name"), "arguments": call["args"]}}


LANGCHAIN = LangChain()
