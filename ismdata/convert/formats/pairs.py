"""Conversations as pairs of a question and its answer: `[{"human": …, "assistant": …}, …]` or `[[…, …], …]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import SYSTEMS, missing_field, take_instruction, take_more_systems, take_text
from ismdata.convert.formats.speakers import to_messages
from ismdata.convert.formats.utterances import UTTERANCES
from ismdata.errors import Refused, shown

#: The two fields of one exchange, as corpora name them; the first pair with both present is read.
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
_NUMBERED = re.compile(r"(.*?[^\W\d_])[ _-]?([0-9]{1,4})")
#: The field in which a record holds its pairs; the first one present is read.
_LISTS = ("conversation", "conversations", "dialog", "dialogue", "turns", "log", "history")


@dataclass(frozen=True, kw_only=True)
class Pairs(CorpusFormat):
    """A record is a list of pairs, or an object with such a list. The first text of each pair is the user's."""

    expects: str = "conversation[].human/assistant, history: [[question, answer], …]"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        if isinstance(record, list):
            pairs = bool(record) and all(isinstance(pair, list) and _is_pair(pair) for pair in record)
            return pairs and not UTTERANCES.matches(record)
        if not isinstance(record, dict):
            return False
        name = _list_field(record)
        if name == "history" and ("output" in record or find_exchange(record) is not None):
            return False  # the last exchange is outside the list: Alpaca, or a prompt and its completion
        listed = record.get(name)
        pairs = isinstance(listed, list) and bool(listed) and all(map(_is_pair, listed))
        return pairs and not UTTERANCES.matches(record)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if isinstance(record, list):
            return [Draft(messages=pair_messages(record, "pair"))]
        fields = dict(fields_of(record))
        name = _list_field(fields)
        if name not in fields:
            raise missing_field(fields, f"a list of pairs in one of {', '.join(_LISTS)}")
        ignored: list[str] = []
        messages = pair_messages(fields.pop(name), name, ignored)
        system = take_system(fields) if messages else []
        if messages and not system and messages[0]["role"] != "system":
            texts = take_instruction(fields, [message["content"] for message in messages])
            system = [{"role": "system", "content": text} for text in texts]
        tools = fields.pop("tools", None)
        return [Draft(messages=system + messages, id=take_id(fields), tools=tools, extra=fields, ignored=ignored)]


def find_exchange(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the two fields of an exchange, in any case of letters; None if the object has none.

    >>> find_exchange({"id": 3, "question": "What?", "answer": "That."})
    ('question', 'answer')
    """
    own = {name.strip().lower(): name for name in reversed([*fields]) if isinstance(name, str)}
    own |= {name: name for name in fields}
    found = next((names for names in EXCHANGES if names[0] in own and names[1] in own), None)
    if found is None or (found[0] == "input" and "instruction" in own):
        return None  # the input of an instruction: Alpaca
    return own[found[0]], own[found[1]]


def take_system(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Remove the system prompt from a record's fields. Returns its messages. Raises Refused if it is no text."""
    texts = [text for text in (take_text(fields, name) for name in SYSTEMS) if text]
    return [{"role": "system", "content": text} for text in (*texts, *take_more_systems(fields, texts))]


def exchange_message(content: Any, role: str) -> list[dict[str, Any]]:
    """One side of an exchange as messages: none if it is empty, because that side says nothing."""
    return (
        []
        if content is None or (isinstance(content, str) and not content.strip())
        else [{"role": role, "content": content}]
    )


def later_exchanges(fields: Mapping[str, Any], names: tuple[str, str]) -> list[tuple[str, str]]:
    """The names of the exchanges that follow the one of `names`, in numbered fields. Empty ones are left out.

    >>> later_exchanges({"question": "a", "answer": "b", "answer_2": "d", "question_2": "c"}, ("question", "answer"))
    [('question_2', 'answer_2')]
    >>> later_exchanges({"message_1": "a", "message_2": "b", "message_3": "c"}, ("message_1", "message_2"))
    [('message_3', '')]
    """
    numbered = _numbered_fields(fields)
    base, first = zip(*map(_base_and_number, names), strict=True)
    if base[0] == base[1]:  # one column, in which both sides take turns
        at, found = first[1] + 1, []
        while (base[0], at) in numbered:
            found.append((numbered[base[0], at], numbered.get((base[0], at + 1), "")))
            at += 2
    else:
        numbers = sorted(
            {at for stem, at in numbered if stem == base[0] and (base[1], at) in numbered and at > first[0]}
        )
        found = [(numbered[base[0], at], numbered[base[1], at]) for at in numbers]
    return [pair for pair in found if any(fields.get(name) not in (None, "") for name in pair)]


def _numbered_fields(fields: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """The fields whose names end with a number, by the rest of the name in lower case and the number."""
    found = ((_NUMBERED.fullmatch(name), name) for name in fields if isinstance(name, str) and name[-1:].isdigit())
    return {(match[1].lower(), int(match[2])): name for match, name in found if match is not None}


def _base_and_number(name: str) -> tuple[str, int]:
    match = _NUMBERED.fullmatch(name)
    return (match[1].lower(), int(match[2])) if match else (name.strip().lower(), -1)


def find_numbered_exchange(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first exchange among numbered fields, such as `question_1` and `answer_1`; None if there is none."""
    numbered = _numbered_fields(fields)
    for at in (0, 1):
        for question, answer in (*EXCHANGES, ("q", "a")):
            if (question, at) in numbered and (answer, at) in numbered:
                return numbered[question, at], numbered[answer, at]
    return None


def pair_messages(
    listed: Any, name: str, ignored: list[str] | None = None, *, whole: bool = True
) -> list[dict[str, Any]]:
    """The messages of a list of pairs; adds other fields of a pair to `ignored`. Raises Refused.

    A question may be empty, and where the pairs are the `whole` conversation its last answer: then they are no message.
    """
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise Refused("invalid_field", f"{name} is {kind_of(listed)}; expected a list of pairs")
    messages: list[dict[str, Any]] = []
    last = len(listed) if whole else 0
    for number, pair in enumerate(listed, 1):
        if not _is_pair(pair):
            found = f"{name} {number} is {shown(pair)}"
            raise Refused("invalid_field", f"{found}; expected a question and its answer, two strings")
        if isinstance(pair, dict):
            names = find_exchange(pair)
            assert names is not None  # by _is_pair
            system = pair.get("system") if number == 1 else None
            if isinstance(system, str):
                messages += [{"role": "system", "content": system}] if system else []
                pair = {other: value for other, value in pair.items() if other != "system"}
            if ignored is not None:
                ignored += [
                    f"{name}[].{other}" for other, value in pair.items() if other not in names and value is not None
                ]
            pair = [pair[one] for one in names]
        messages += exchange_message(pair[0], "user")
        messages += exchange_message(pair[1], "assistant") if number == last else to_messages(["assistant"], [pair[1]])
    if messages and not any(message["role"] == "assistant" for message in messages):
        raise Refused("empty_answer", f"all answers in {name} are empty")
    return messages


def _is_pair(pair: Any) -> bool:
    if isinstance(pair, dict):
        names = find_exchange(pair)
        pair = [pair[name] for name in names] if names else None
    if not isinstance(pair, list) or len(pair) != 2 or not all(text is None or isinstance(text, str) for text in pair):
        return False
    return any(pair) or "" in pair


def _list_field(fields: Mapping[str, Any]) -> str:
    """The field that holds the pairs, "" if there is none."""
    return next((name for name in _LISTS if name in fields), "")


PAIRS = Pairs()
