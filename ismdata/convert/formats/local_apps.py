"""Chats of programs around models: Open WebUI and LM Studio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import missing_field, path_to
from ismdata.convert.formats.messages import OPENAI
from ismdata.errors import Refused, shown

_OTHER_BRANCHES = "messages of other branches"
#: Message fields of Open WebUI that are about the program.
_ABOUT = frozenset({"id", "parentId", "childrenIds", "timestamp", "models", "model", "modelName", "modelIdx", "done"})


@dataclass(frozen=True, kw_only=True)
class OpenWebui(CorpusFormat):
    """A record is a chat: the messages from the first to `chat.history.currentId`. Other branches are left out."""

    expects: str = "chat.history.messages and currentId, as Open WebUI exports chats"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return isinstance(record, dict) and _history(record) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        history = _history(fields)
        if history is None:
            raise missing_field(fields, self.expects)
        chat = fields.pop("chat")
        nodes = history["messages"]
        path = path_to(nodes, history.get("currentId"), "parentId")
        messages = [{name: value for name, value in node.items() if name not in _ABOUT} for node in path]
        params = chat.get("params")
        system = params.get("system") if isinstance(params, dict) else None
        (draft,) = OPENAI.parse_record({"messages": messages, "system": system})
        ignored = [*draft.ignored, *[_OTHER_BRANCHES] * (len(nodes) - len(path))]
        return [replace(draft, id=take_id(fields), extra=fields, ignored=ignored)]


def _history(record: Mapping[str, Any]) -> dict[str, Any] | None:
    chat = record.get("chat")
    history = chat.get("history") if isinstance(chat, dict) else None
    return history if isinstance(history, dict) and isinstance(history.get("messages"), dict) else None


@dataclass(frozen=True, kw_only=True)
class LmStudio(CorpusFormat):
    """A record is a chat. Of each message the selected version is read."""

    expects: str = "messages[].versions[] and currentlySelected, as LM Studio saves chats"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        listed = record.get("messages") if isinstance(record, dict) else None
        return isinstance(listed, list) and bool(listed) and isinstance(listed[0], dict) and "versions" in listed[0]

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        listed = fields.pop("messages", None)
        if not isinstance(listed, list):
            raise missing_field(fields, "'messages'")
        ignored: list[str] = []
        messages = [_selected(one, number, ignored) for number, one in enumerate(listed, 1)]
        (draft,) = OPENAI.parse_record({"messages": messages, "system": fields.pop("systemPrompt", None)})
        return [replace(draft, id=take_id(fields), extra=fields, ignored=[*draft.ignored, *ignored])]


def _selected(message: Any, number: int, ignored: list[str]) -> dict[str, Any]:
    """The selected version of a message as role and content. Raises Refused."""
    versions = message.get("versions") if isinstance(message, dict) else None
    at = message.get("currentlySelected", 0) if isinstance(message, dict) else 0
    if not isinstance(versions, list) or not isinstance(at, int) or not 0 <= at < len(versions):
        raise Refused("invalid_field", f"message {number} is {shown(message)}; expected versions and one selected")
    ignored += ["versions that are not selected"] * (len(versions) - 1)
    version = fields_of(versions[at])
    steps = version.get("steps") if version.get("type") == "multiStep" else [version]
    if not isinstance(steps, list):
        raise Refused("invalid_field", f"message {number} has steps that are {kind_of(steps)}; expected a list")
    parts: list[Any] = []
    for step in map(fields_of, steps):
        content = step.get("content")
        if step.get("type") == "debugInfoBlock":
            continue
        style = step.get("style")
        if isinstance(style, dict) and style.get("type") == "thinking" and isinstance(content, list):
            content = [{**fields_of(part), "type": "thinking"} for part in content]
        parts += content if isinstance(content, list) else [content]
    return {"role": version.get("role"), "content": parts}


OPEN_WEBUI = OpenWebui()
LM_STUDIO = LmStudio()
