"""Preference data: a better and a worse answer to one prompt, of which `--preference` says which to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.choices import Preference
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.messages import OPENAI, SHAREGPT
from ismdata.convert.formats.pairs import system_of
from ismdata.convert.formats.separated import marked_turns
from ismdata.convert.formats.speakers import spoken
from ismdata.errors import Refused, shown

#: The two answers, as corpora name them.
_SIDES = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("response", "rejected_response"),
)
#: Two conversations of which `winner` names the better one, by the end of its name: the arena's battles.
_BATTLE = ("conversation_a", "conversation_b")
_WINNERS = {"model_a": _BATTLE, "model_b": _BATTLE[::-1]}
#: Earlier messages, and single prompts: the first one present is what the answers answer.
_EARLIER = ("messages", "conversations")
_PROMPTS = ("prompt", "instruction", "question", "query", "input")

_Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PreferencePairs(CorpusFormat):
    """A record is an object with a chosen and a rejected side, each an answer or a whole conversation.

    A side is a text, a message or a list of messages. The side that is not read is counted among the ignored fields.
    """

    expects: str = "prompt, chosen, rejected"
    plain_text: bool = False
    preference: Preference | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)

    def matches(self, record: Any) -> bool:
        names = _names_of(record)
        return names is not None and all(isinstance(record[name], str | list | dict) for name in names)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        names = _names_of(fields_of(record))
        if names is None:
            found = f"the record has {', '.join(map(str, record)) or 'no field'}"
            raise Refused("missing_field", f"{found}; expected a chosen and a rejected side")
        if self.preference is None:
            raise Refused(
                "no_preference",
                "the record has a better and a worse answer; expected to be told which to read. "
                "Pass --preference chosen to read the chosen side",
            )
        fields = dict(record)
        if names == _BATTLE:
            names = _ranked(fields.get("winner"))
        wanted, other = names if self.preference == "chosen" else names[::-1]
        side = fields.pop(wanted)
        ignored = [other] if fields.pop(other) is not None else []
        own, tools = take_id(fields), fields.pop("tools", None)
        asked = fields.get("input")
        if tools is None and isinstance(asked, dict):
            tools = asked.get("tools")
        first = system_of(fields)
        messages = self._messages(side, wanted, fields, ignored)
        return [Draft(messages=first + messages, id=own, tools=tools, extra=fields, ignored=ignored)]

    def _messages(self, side: Any, name: str, fields: dict[str, Any], ignored: list[str]) -> _Messages:
        """The conversation of one side; the fields that are part of it are taken out of `fields`."""
        if isinstance(side, str):
            turns = _marked(side, fields)
            if turns:
                return spoken([speaker for speaker, _ in turns], [text for _, text in turns])
        answer = _side(side, "assistant", name, ignored)
        if not self._has_user(answer):
            return self._earlier(fields, ignored) + answer
        # A whole conversation: a prompt beside it that it repeats, and the same conversation again, have been read.
        prompt = fields.get("prompt")
        if prompt in [message.get("content") for message in answer] or _is_opening(prompt, side):
            fields.pop("prompt", None)
        ignored += [repeated for repeated in _EARLIER if fields.pop(repeated, None) is not None]
        return answer

    def _has_user(self, messages: _Messages) -> bool:
        names = [message.get("role") for message in messages]
        return any(isinstance(name, str) and self.roles.get(name.lower()) == "user" for name in names)

    def _earlier(self, fields: dict[str, Any], ignored: list[str]) -> _Messages:
        """What an answer answers."""
        name = next((name for name in (*_EARLIER, *_PROMPTS) if fields.get(name) is not None), None)
        if name is None:
            found = f"beside the answers the record has {', '.join(map(str, fields)) or 'nothing'}"
            raise Refused("missing_field", f"{found}; expected a prompt in one of {', '.join((*_PROMPTS, *_EARLIER))}")
        prompt = fields.pop(name)
        if name == "input" and isinstance(prompt, dict) and isinstance(prompt.get("messages"), list):
            prompt = prompt["messages"]  # OpenAI's preference files
        given = fields.get("input")
        if name == "instruction" and isinstance(prompt, str) and isinstance(given, str):
            prompt = f"{prompt}\n{given}" if given else prompt
            del fields["input"]
        return _side(prompt, "user", name, ignored)


def _names_of(record: Any) -> tuple[str, str] | None:
    if not isinstance(record, dict):
        return None
    if all(name in record for name in (*_BATTLE, "winner")):
        return _BATTLE
    return next((names for names in _SIDES if names[0] in record and names[1] in record), None)


def _ranked(winner: Any) -> tuple[str, str]:
    """The better and the worse conversation of a battle. Raises Refused where neither is."""
    if not isinstance(winner, str) or winner not in _WINNERS:
        raise Refused(
            "no_preference", f"winner is {shown(winner)}; expected {' or '.join(_WINNERS)}: neither is better"
        )
    return _WINNERS[winner]


def _marked(side: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """The turns of texts such as "Human: … Assistant: …"; empty where a side is not, or does not go on, such a text.

    Beside a prompt of another kind an answer is an answer, whatever it looks like.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and (turns := marked_turns(prompt)):
        del fields["prompt"]
        if turns[-1][0] == "Assistant":
            return marked_turns(prompt + side)
        return [*turns, ("Assistant", side.strip())]
    if any(fields.get(name) is not None for name in (*_EARLIER, *_PROMPTS)):
        return []
    turns = marked_turns(side)
    return turns if len({speaker for speaker, _ in turns}) > 1 else []


def _is_opening(prompt: Any, side: Any) -> bool:
    """Whether a prompt, a list of messages, is what the messages of a side begin with."""
    return isinstance(prompt, list) and isinstance(side, list) and side[: len(prompt)] == prompt


def _side(value: Any, role: str, name: str, ignored: list[str]) -> _Messages:
    """A text, one message or a list of messages as messages under our names. Raises Refused."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list):
        raise Refused("invalid_field", f"{name} is {kind_of(value)}; expected a text or messages")
    named_from = any(isinstance(message, dict) and "from" in message for message in listed)
    corpus_format = SHAREGPT if named_from else OPENAI
    (draft,) = corpus_format.parse_record({corpus_format.messages: listed})
    ignored += [f"{name}[].{one.partition('.')[2]}" for one in draft.ignored]
    return list(draft.messages)


PREFERENCE = PreferencePairs()
