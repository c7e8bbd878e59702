"""MOSS: turns by number, each with five channels between marks such as `<|Human|>: ` and `<eoh>`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of
from ismdata.errors import Refused, shown

_TURN = re.compile(r"turn_([0-9]{1,9})")
_OPENING = re.compile(r"\s*<\|(Human|Inner Thoughts|Commands|Tool Responses|Results|MOSS)\|>:?")
_CLOSINGS = ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>")
#: What a channel says that is not used, with or without words on why.
_UNUSED = re.compile(r"None?(?!\w)")
_CALL = re.compile(r'(\w+)\("([^"]*)"\)[\s,]*')
#: How the system prompt tells what a tool's argument is called.
_API = re.compile(r"API: *(\w+)\((\w+)\)")


@dataclass(frozen=True, kw_only=True)
class Moss(CorpusFormat):
    """The system prompt is `meta_instruction`; thoughts become the reasoning of the answer or of the call after them.

    `conversation_id` counts within a folder only, so it goes to `meta` and the id is made from the place.
    """

    expects: str = "chat: {turn_1: {Human, MOSS, …}, …}"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        chat = record.get("chat") if isinstance(record, dict) else None
        return (
            isinstance(chat, dict)
            and bool(chat)
            and all(_TURN.fullmatch(str(name)) for name in chat)
            and all(isinstance(turn, dict) and {"Human", "MOSS"} <= turn.keys() for turn in chat.values())
        )

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        chat = fields.pop("chat", None)
        if not isinstance(chat, dict):
            raise Refused("missing_field", f"chat is {kind_of(chat)}; expected an object of turns")
        system = fields.pop("meta_instruction", None)
        if system is not None and not isinstance(system, str):
            raise Refused("invalid_field", f"meta_instruction is {kind_of(system)}; expected a string")
        arguments = dict(_API.findall(system or ""))
        ignored: list[str] = []
        messages: list[dict[str, Any]] = []
        for name in sorted(chat, key=_number):
            messages += _turn(chat[name], name, arguments, ignored)
        # `num_turns` says what can be counted.
        fields.pop("num_turns", None)
        first = [{"role": "system", "content": system.strip()}] if system and system.strip() and messages else []
        return [Draft(messages=first + messages, extra=fields, ignored=ignored)]


def _number(name: str) -> int:
    match = _TURN.fullmatch(name)
    if match is None:
        raise Refused("invalid_field", f"chat has the turn {shown(name)}; expected turn_1, turn_2 and so on")
    return int(match.group(1))


def _turn(turn: Any, place: str, arguments: Mapping[str, str], ignored: list[str]) -> list[dict[str, Any]]:
    """The messages of one turn: the user's, and the answer; between them the calls and what came of them."""
    if not isinstance(turn, dict):
        raise Refused("not_an_object", f"{place} is {kind_of(turn)}; expected an object")
    for name in ("Human", "MOSS"):
        if name not in turn:
            raise Refused("missing_field", f"{place} has no {name!r}; it has {', '.join(map(str, turn)) or 'nothing'}")
    said = {name: _channel(turn.get(name), f"{place}'s {name}") for name in _CHANNELS}
    ignored += [f"chat.{name}" for name, value in turn.items() if name not in _CHANNELS and value is not None]
    thoughts, commands, results = (_used(said[name]) for name in ("Inner Thoughts", "Commands", "Tool Responses"))
    if commands is None and said["Commands"] not in (None, "", "None"):
        ignored.append("chat.Commands")
    messages: list[dict[str, Any]] = [{"role": "user", "content": said["Human"]}]
    answer: dict[str, Any] = {"role": "assistant", "content": said["MOSS"]}
    if commands is not None:
        calls = _calls(commands, place, arguments)
        messages.append({"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": thoughts})
    elif thoughts is not None:
        answer["reasoning_content"] = thoughts
    if results is not None:
        messages.append({"role": "tool", "content": results})
    return [*messages, answer]


_CHANNELS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")


def _channel(value: Any, place: str) -> str | None:
    """A channel's text without the marks at its ends and the blanks beside them."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise Refused("invalid_content", f"{place} is {kind_of(value)}; expected a string")
    match = _OPENING.match(value)
    start, end = match.end() if match else 0, len(value.rstrip())
    while value.endswith(_CLOSINGS, start, end):
        end -= len(_CLOSINGS[0])
        while end > start and value[end - 1].isspace():
            end -= 1
    return value[start:end].strip()


def _used(text: str | None) -> str | None:
    return None if not text or _UNUSED.match(text) else text


def _calls(commands: str, place: str, arguments: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tool calls of `Search("a"), Calculate("b")`; each has one argument, which is a text."""
    found, at = [], 0
    while match := _CALL.match(commands, at):
        name, value = match.groups()
        found.append({"name": name, "arguments": {arguments.get(name, "input"): value}})
        at = match.end()
    if not found or not (at == len(commands) or _UNUSED.fullmatch(commands, at)):
        raise Refused(
            "invalid_tool_call", f'{place} has the commands {shown(commands)}; expected Name("text"), Name("text"), …'
        )
    return found


MOSS = Moss()
