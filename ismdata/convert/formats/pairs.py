"""Conversations as pairs of a question and its answer: `[{"human": …, "assistant": …}, …]` or `[[…, …], …]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.utterances import UTTERANCES
from ismdata.errors import Refused, shown

#: The two fields of one exchange, as corpora name them; the first ones present together are read.
EXCHANGES = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("human", "bot"),
    ("user", "bot"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("instruction", "completion"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("query", "answer"),
    ("question", "output"),
    ("question", "solution"),
    ("problem", "solution"),
    ("input", "target"),
    ("input", "response"),
    ("inputs", "targets"),
    ("input_text", "output_text"),
    ("user_utterance", "system_utterance"),
    ("user utterance", "system response"),
    ("message_1", "message_2"),
    ("patient", "doctor"),
    ("context", "response"),
)
#: Where a record keeps its pairs; the first one present is read.
_LISTS = ("conversation", "conversations", "dialog", "dialogue", "turns", "log", "history")
#: Fields whose text becomes the first message.
SYSTEMS = ("system", "system_prompt")


@dataclass(frozen=True, kw_only=True)
class Pairs(CorpusFormat):
    """A record is an object with a list of pairs, or such a list: the first of each is the user's."""

    expects: str = "conversation[].human/assistant, history: [[question, answer], …]"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        if isinstance(record, list):
            pairs = bool(record) and all(isinstance(pair, list) and _is_pair(pair) for pair in record)
            return pairs and not UTTERANCES.matches(record)
        if not isinstance(record, dict):
            return False
        name = _name_of(record)
        if name == "history" and ("output" in record or exchange_of(record) is not None):
            return False  # the last exchange stands outside the list: Alpaca, or a prompt and its completion
        listed = record.get(name)
        return (
            isinstance(listed, list) and bool(listed) and all(map(_is_pair, listed)) and not UTTERANCES.matches(record)
        )

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if isinstance(record, list):
            return [Draft(messages=messages_of(record, "pair"))]
        fields = dict(fields_of(record))
        name = _name_of(fields)
        if name not in fields:
            found = f"the record has {', '.join(map(str, fields)) or 'no field'}"
            raise Refused("missing_field", f"{found}; expected a list of pairs in one of {', '.join(_LISTS)}")
        ignored: list[str] = []
        messages = messages_of(fields.pop(name), name, ignored)
        first = system_of(fields) if messages else []
        tools = fields.pop("tools", None)
        return [Draft(messages=first + messages, id=take_id(fields), tools=tools, extra=fields, ignored=ignored)]


def exchange_of(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names under which an object holds one exchange, in any case of letters, or None.

    >>> exchange_of({"id": 3, "question": "What?", "answer": "That."})
    ('question', 'answer')
    """
    own = {name.strip().lower(): name for name in reversed([*fields]) if isinstance(name, str)}
    own |= {name: name for name in fields}
    found = next((names for names in EXCHANGES if names[0] in own and names[1] in own), None)
    if found is None or (found[0] == "input" and "instruction" in own):
        return None  # beside an instruction the input is what that is about: Alpaca
    return own[found[0]], own[found[1]]


def system_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Take the system prompt out of a record's fields: one message, or none. Raises Refused when it is no text."""
    found = []
    for name in SYSTEMS:
        text = fields.pop(name, None)
        if text is not None and not isinstance(text, str):
            raise Refused("invalid_field", f"{name} is {kind_of(text)}; expected a string")
        if text:
            found.append({"role": "system", "content": text})
    return found


def messages_of(listed: Any, name: str, ignored: list[str] | None = None) -> list[dict[str, Any]]:
    """Messages of a list of pairs; further fields of a pair go to `ignored`. Raises Refused."""
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise Refused("invalid_field", f"{name} is {kind_of(listed)}; expected a list of pairs")
    messages: list[dict[str, Any]] = []
    for number, pair in enumerate(listed, 1):
        if not _is_pair(pair):
            found = f"{name} {number} is {shown(pair)}"
            raise Refused("invalid_field", f"{found}; expected a question and its answer, two strings")
        if isinstance(pair, dict):
            names = exchange_of(pair)
            assert names is not None  # _is_pair saw to it
            before = pair.get("system") if number == 1 else None
            if isinstance(before, str):
                messages += [{"role": "system", "content": before}] if before else []
                pair = {other: value for other, value in pair.items() if other != "system"}
            if ignored is not None:
                ignored += [
                    f"{name}[].{other}" for other, value in pair.items() if other not in names and value is not None
                ]
            pair = [pair[one] for one in names]
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _is_pair(pair: Any) -> bool:
    if isinstance(pair, dict):
        names = exchange_of(pair)
        pair = [pair[name] for name in names] if names else None
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _name_of(fields: Mapping[str, Any]) -> str:
    return next((name for name in _LISTS if name in fields), "")


PAIRS = Pairs()
