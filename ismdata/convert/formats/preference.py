"""Preference data: a better and a worse answer to one prompt, or one answer with a label (KTO).

`--preference` says which answers to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.choices import Preference
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.answer_labels import check_labels, labels_of, may_be_labelled
from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, take_id
from ismdata.convert.formats.alpaca import ALPACA
from ismdata.convert.formats.fields import listed_names, missing_field
from ismdata.convert.formats.messages import OPENAI, SHAREGPT
from ismdata.convert.formats.pairs import take_system
from ismdata.convert.formats.prompt_completion import PROMPT_COMPLETION, side_messages
from ismdata.convert.formats.separated import split_marked_turns
from ismdata.convert.formats.speakers import to_messages
from ismdata.errors import Refused, shown

#: The two answers, as corpora name them.
_SIDES = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("response", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
)
#: The worse answer replaces the last answer of the messages: ms-swift.
_LAST_ANSWER = ("messages", "rejected_response")
_LAST = ("assistant", "rejected_response")
#: Two conversations; the end of `winner` names the better one. Battles of Chatbot Arena.
_BATTLE = ("conversation_a", "conversation_b")
_WINNERS = {"model_a": _BATTLE, "model_b": _BATTLE[::-1]}
#: Earlier messages, and single prompts; the first one present precedes the answer.
_EARLIER = ("messages", "conversations")
_PROMPTS = ("prompt", "instruction", "question", "query", "input")

#: The formats of a record without its label.
LABELLED: tuple[CorpusFormat, ...] = (OPENAI, SHAREGPT, ALPACA, PROMPT_COMPLETION)

_Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PreferencePairs(CorpusFormat):
    """A record is an object with a chosen and a rejected side, each an answer or a whole conversation.

    A side is a text, a message or a list of messages. The side that is not read counts as an ignored field.
    """

    expects: str = "prompt, chosen, rejected"
    plain_text: bool = False
    preference: Preference | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)

    def matches(self, record: Any) -> bool:
        names = _side_names(record)
        return names is not None and all(isinstance(record[name], str | list | dict) for name in names)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        names = _side_names(fields_of(record))
        if names is None:
            raise missing_field(record, "a chosen and a rejected side")
        if self.preference is None:
            raise Refused(
                "no_preference",
                "the record has a better and a worse answer; expected a choice between them. "
                "Use --preference chosen to read the better one",
            )
        fields = dict(record)
        if names == _LAST_ANSWER and isinstance(fields["messages"], list):
            fields["rejected_response"] = [*fields["messages"][:-1], *_side(fields["rejected_response"], *_LAST, [])]
        if names == _BATTLE:
            names = _ranked(fields.get("winner"))
        wanted, other = names if self.preference == "chosen" else names[::-1]
        side = fields.pop(wanted)
        ignored = [other] if fields.pop(other) is not None else []
        own_id, tools = take_id(fields), fields.pop("tools", None)
        prompt = fields.get("input")
        if tools is None and isinstance(prompt, dict):
            tools = prompt.get("tools")
        system = take_system(fields)
        messages = self._messages(side, wanted, fields, ignored)
        return [Draft(messages=system + messages, id=own_id, tools=tools, extra=fields, ignored=ignored)]

    def _messages(self, side: Any, name: str, fields: dict[str, Any], ignored: list[str]) -> _Messages:
        """The conversation of one side; removes the fields that are part of it from `fields`."""
        if isinstance(side, str):
            turns = _take_marked_turns(side, fields)
            if turns:
                return to_messages(*zip(*turns, strict=True))
        answer = _side(side, "assistant", name, ignored)
        if not self._has_user(answer):
            return self._take_prompt(fields, ignored) + answer
        # A whole conversation. A prompt that it repeats, and a second copy of the conversation, are not needed.
        prompt = fields.get("prompt")
        if prompt in [message.get("content") for message in answer] or _is_opening(prompt, side):
            fields.pop("prompt", None)
        ignored += [repeated for repeated in _EARLIER if fields.pop(repeated, None) is not None]
        return answer

    def _has_user(self, messages: _Messages) -> bool:
        names = [message.get("role") for message in messages]
        return any(isinstance(name, str) and self.roles.get(name.lower()) == "user" for name in names)

    def _take_prompt(self, fields: dict[str, Any], ignored: list[str]) -> _Messages:
        """The messages before the answer; removes them from `fields`."""
        name = next((name for name in (*_EARLIER, *_PROMPTS) if fields.get(name) is not None), None)
        if name is None:
            raise missing_field(fields, f"a prompt in one of {', '.join((*_PROMPTS, *_EARLIER))}")
        prompt = fields.pop(name)
        if name == "input" and isinstance(prompt, dict) and isinstance(prompt.get("messages"), list):
            prompt = prompt["messages"]  # OpenAI's preference files
        given = fields.get("input")
        if name == "instruction" and isinstance(prompt, str) and isinstance(given, str):
            prompt = f"{prompt}\n{given}" if given else prompt
            del fields["input"]
        return _side(prompt, "user", name, ignored)


def _side_names(record: Any) -> tuple[str, str] | None:
    if not isinstance(record, dict):
        return None
    if all(name in record for name in (*_BATTLE, "winner")):
        return _BATTLE
    return next((names for names in _SIDES if names[0] in record and names[1] in record), None)


def _ranked(winner: Any) -> tuple[str, str]:
    """The better and the worse conversation of a battle. Raises Refused if neither won."""
    if not isinstance(winner, str) or winner not in _WINNERS:
        raise Refused("no_preference", f"winner is {shown(winner)}; expected {' or '.join(_WINNERS)}")
    return _WINNERS[winner]


def _take_marked_turns(side: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """The turns of a side that is a text such as "Human: … Assistant: …", or that continues such a prompt; else empty.

    Beside a prompt of another kind, the side is a plain answer, even if it contains such marks.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and (turns := split_marked_turns(prompt)):
        del fields["prompt"]
        if turns[-1][0] == "Assistant":
            return split_marked_turns(prompt + side)
        return [*turns, ("Assistant", side.strip())]
    if any(fields.get(name) is not None for name in (*_EARLIER, *_PROMPTS)):
        return []
    turns = split_marked_turns(side)
    return turns if len({speaker for speaker, _ in turns}) > 1 else []


def _is_opening(prompt: Any, side: Any) -> bool:
    """Whether a prompt is a list of messages with which the messages of a side begin."""
    return isinstance(prompt, list) and isinstance(side, list) and side[: len(prompt)] == prompt


def _side(value: Any, role: str, name: str, ignored: list[str]) -> _Messages:
    """A text, a message or a list of messages, of OpenAI's or ShareGPT's format, as messages. Raises Refused."""
    listed = value if isinstance(value, list) else [value]
    named_from = any(isinstance(message, dict) and "from" in message for message in listed)
    return side_messages(value, role, name, ignored, SHAREGPT if named_from else OPENAI)


@dataclass(frozen=True, kw_only=True)
class Kto(CorpusFormat):
    """An answer with a label. Those labelled as good are read, or as bad with `preference` "rejected"."""

    expects: str = "messages or prompt/completion, label: true or false"
    plain_text: bool = False
    preference: Preference | None = None

    def matches(self, record: Any) -> bool:
        if not isinstance(record, dict) or not may_be_labelled(record):
            return False
        try:
            labelled = bool(labels_of(record))
        except Refused:
            labelled = True
        return labelled and _format_beside_label(record) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        found = labels_of(fields)
        if not found:
            given = {name: value for name, value in fields.items() if may_be_labelled({name: value})}
            what = (
                " and ".join(f"{name} is {shown(value)}" for name, value in given.items()) or "the record has no label"
            )
            raise Refused("invalid_field", f"{what}; expected a label, true or false, as in other records of the file")
        check_labels(fields, self.preference)
        for name in found:
            del fields[name]
        inner = _format_beside_label(fields)
        if inner is None:
            what = f"beside {' and '.join(found)} the record has the fields {listed_names(fields)}"
            raise Refused("missing_field", f"{what}; expected messages, conversations or prompt/completion")
        return inner.parse_record(fields)


def _format_beside_label(fields: dict[str, Any]) -> CorpusFormat | None:
    return next((one for one in LABELLED if one.matches(fields)), None)


PREFERENCE = PreferencePairs()
KTO = Kto()
