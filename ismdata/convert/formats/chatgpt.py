"""Chats as ChatGPT exports them: a tree of messages in `mapping`; the path to `current_node` is the chat last shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import path_to
from ismdata.errors import Refused, shown

#: Content types that are no part of the conversation: thoughts, settings.
_ASIDE = frozenset({"user_editable_context", "model_editable_context", "thoughts", "reasoning_recap"})
_OTHER_BRANCHES = "messages of other branches"


@dataclass(frozen=True, kw_only=True)
class ChatGptExport(CorpusFormat):
    """A record is a chat: the messages from the root of `mapping` to `current_node`. Other branches are left out."""

    expects: str = "mapping and current_node, as ChatGPT exports chats"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return isinstance(record, dict) and isinstance(record.get("mapping"), dict) and "current_node" in record

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        mapping, current = fields.pop("mapping", None), fields.pop("current_node", None)
        if not isinstance(mapping, dict):
            raise Refused("invalid_field", f"mapping is {kind_of(mapping)}; expected an object of messages by id")
        nodes = path_to(mapping, current, "parent")
        path = [message for message in map(_message_of, nodes) if message is not None]
        ignored = [_OTHER_BRANCHES] * (sum(_message_of(node) is not None for node in mapping.values()) - len(path))
        messages = [message for node in path for message in _converted(node, ignored)]
        return [Draft(messages=messages, id=take_id(fields), extra=fields, ignored=ignored)]


def _message_of(node: Any) -> dict[str, Any] | None:
    message = node.get("message") if isinstance(node, dict) else None
    return message if isinstance(message, dict) else None


def _converted(message: Mapping[str, Any], ignored: list[str]) -> list[dict[str, Any]]:
    """The message of a draft; none for thoughts, settings and an empty system prompt. Raises Refused."""
    author, content = message.get("author"), message.get("content")
    role = author.get("role") if isinstance(author, dict) else None
    kind = content.get("content_type") if isinstance(content, dict) else None
    parts = content.get("parts") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind in _ASIDE:
        ignored.append(f"messages of content_type {kind!r}")
        return []
    metadata = message.get("metadata")
    if isinstance(metadata, dict) and metadata.get("attachments"):
        raise Refused("unsupported_content", f"a message of {shown(role)} has attachments; expected only text")
    if kind != "text" or not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        what = f"content of type {shown(kind)}" if kind != "text" else "parts that are not text"
        raise Refused("unsupported_content", f"a message of {shown(role)} has {what}; expected only text")
    text = "".join(parts)
    if not text and role == "system":
        return []  # each chat begins with one
    return [{"role": role, "content": text}]


CHATGPT_EXPORT = ChatGptExport()
