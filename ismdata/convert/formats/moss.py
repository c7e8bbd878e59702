"""MOSS: numbered turns, each with five channels between marks such as `<|Human|>: ` and `<eoh>`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of
from ismdata.convert.formats.fields import listed_names, take_text
from ismdata.errors import Refused, shown

_TURN = re.compile(r"turn_([0-9]{1,9})")
_CHANNELS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
_OPENING = re.compile(r"\s*<\|(Human|Inner Thoughts|Commands|Tool Responses|Results|MOSS)\|>:?")
_CLOSINGS = ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>")
#: The text of an unused channel; an explanation may follow.
_UNUSED = re.compile(r"None?(?!\w)")
_CALL = re.compile(r'(\w+)\("([^"]*)"\)[\s,]*')
#: The system prompt names the argument of each tool in this way.
_API = re.compile(r"API: *(\w+)\((\w+)\)")


@dataclass(frozen=True, kw_only=True)
class Moss(CorpusFormat):
    """The system prompt is `meta_instruction`; thoughts become the reasoning of the answer or call that follows them.

    `conversation_id` is unique only within one folder. It goes to `meta`, and the id is made from file and place.
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
        system = take_text(fields, "meta_instruction")
        arguments = dict(_API.findall(system or ""))
        ignored: list[str] = []
        messages: list[dict[str, Any]] = []
        for name in sorted(chat, key=_turn_number):
            messages += _turn_messages(chat[name], name, arguments, ignored)
        # `num_turns` only repeats the number of turns.
        fields.pop("num_turns", None)
        first = [{"role": "system", "content": system.strip()}] if system and system.strip() and messages else []
        return [Draft(messages=first + messages, extra=fields, ignored=ignored)]


def _turn_number(name: str) -> int:
    match = _TURN.fullmatch(name)
    if match is None:
        raise Refused("invalid_field", f"chat has the turn {shown(name)}; expected turn_1, turn_2 and so on")
    return int(match.group(1))


def _turn_messages(turn: Any, place: str, arguments: Mapping[str, str], ignored: list[str]) -> list[dict[str, Any]]:
    """The messages of one turn: the user's, the tool calls and their results, the answer."""
    if not isinstance(turn, dict):
        raise Refused("not_an_object", f"{place} is {kind_of(turn)}; expected an object")
    for name in ("Human", "MOSS"):
        if name not in turn:
            raise Refused("missing_field", f"{place} has the fields {listed_names(turn)}; expected {name!r} among them")
    texts = {name: _channel_text(turn.get(name), f"{place}'s {name}") for name in _CHANNELS}
    ignored += [f"chat.{name}" for name, value in turn.items() if name not in _CHANNELS and value is not None]
    thoughts, commands, results = (_used(texts[name]) for name in ("Inner Thoughts", "Commands", "Tool Responses"))
    if commands is None and texts["Commands"] not in (None, "", "None"):
        ignored.append("chat.Commands")
    messages: list[dict[str, Any]] = [{"role": "user", "content": texts["Human"]}]
    answer: dict[str, Any] = {"role": "assistant", "content": texts["MOSS"]}
    if commands is not None:
        calls = _tool_calls(commands, place, arguments)
        messages.append({"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": thoughts})
    elif thoughts is not None:
        answer["reasoning_content"] = thoughts
    if results is not None:
        messages.append({"role": "tool", "content": results})
    return [*messages, answer]


def _channel_text(value: Any, place: str) -> str | None:
    """A channel's text without the marks at its ends and the whitespace around them."""
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


def _tool_calls(commands: str, place: str, arguments: Mapping[str, str]) -> list[dict[str, Any]]:
    """The tool calls in `Search("a"), Calculate("b")`; each has one argument, a string."""
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
