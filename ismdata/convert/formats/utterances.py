"""Transcripts: lists of utterances with the name of who speaks, as dialogue research publishes its corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.messages import OPENAI, SIDES
from ismdata.convert.formats.speakers import alternating, played
from ismdata.errors import Refused, shown

#: Where a record keeps its utterances; the first one present is read.
_LISTS = (
    "utterances",
    "dialog",
    "dialogue",
    "turns",
    "log",
    "content",
    "messages",
    "conversation",
    "conversations",
    "chat_history",
    "original",
)
#: Who speaks, and what is said: the first name present of each.
_SPEAKERS = ("speaker", "agent", "role", "author", "sender", "speaker_role", "speaker_name", "speaker_id", "user")
_TEXTS = ("text", "utterance", "content", "message")
#: Who speaks, as a truth value: the role where it holds, and the other one.
_FLAGS = {
    "is_human": ("user", "assistant"),
    "is_user": ("user", "assistant"),
    "from_user": ("user", "assistant"),
    "is_bot": ("assistant", "user"),
    "is_assistant": ("assistant", "user"),
}
#: Moves of an agent that stand among the utterances of `[speaker, text]` lists and are none.
_ACTION = "action"
#: The list whose speakers take turns unnamed, as in MultiWOZ before its version 2.2.
_UNNAMED = ("log", "text")
#: Where a record's `context` is the system prompt: chats of PaLM.
_PALM = ("messages", "author")
#: Under these names texts are taken as they are; transcripts of people typing or talking end in stray blanks.
_EXACT = frozenset({"role"})


@dataclass(frozen=True, kw_only=True)
class Names:
    """Which fields hold the list, who speaks (None: the speakers alternate) and what is said.

    `exact`: each utterance is `[speaker, text]`, without names.
    """

    utterances: str
    speaker: str | None
    text: str
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Utterances(CorpusFormat):
    """A record is an object with a list of `{speaker, text}` under the usual names of such fields."""

    expects: str = "utterances[].speaker/text and the like, log[].text"
    plain_text: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        record = _as_object(record)
        names = names_of(record)
        return names is not None and (names.utterances == "messages" or not OPENAI.matches(record))

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(_as_object(record)))
        names = names_of(fields)
        if names is None:
            raise Refused(*_misfit(fields))
        listed, ignored = _elements(fields.pop(names.utterances), names)
        for number, utterance in enumerate(listed, 1):
            if not isinstance(utterance, dict):
                raise Refused("not_an_object", f"utterance {number} is {kind_of(utterance)}; expected an object")
        contents = [_text(utterance.get(names.text), names) for utterance in listed]
        used = {names.speaker, names.text}
        ignored += [
            f"{names.utterances}[].{name}"
            for utterance in listed
            for name, value in utterance.items()
            if name not in used and value is not None
        ]
        own = take_id(fields)
        context = fields.get("context") if (names.utterances, names.speaker) == _PALM else None
        first = [{"role": "system", "content": fields.pop("context")}] if isinstance(context, str) and context else []
        if names.speaker is None:
            sides = alternating(len(listed), self.assistant)
        else:
            speakers = [_speaker(utterance, names.speaker, number) for number, utterance in enumerate(listed, 1)]
            sides = played(speakers, self.roles, self.assistant)
        return [
            Draft(
                messages=first + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)],
                id=own,
                extra=fields,
                ignored=ignored,
                part=part,
            )
            for part, roles in sides
        ]


def names_of(record: Any) -> Names | None:
    """The names that a record uses, or None when it holds no such list.

    >>> names_of({"dialog": [{"speaker": "Ann", "text": "Hi"}]})
    Names(utterances='dialog', speaker='speaker', text='text')
    """
    if not isinstance(record, dict):
        return None
    utterances = next((name for name in _LISTS if _is_list(record.get(name))), None)
    if utterances is None:
        return None
    listed = record[utterances]
    if _are_named(listed):
        return Names(utterances=utterances, speaker="speaker", text="text", exact=True)
    if isinstance(listed, dict):
        listed = _turned(listed)
    first = next(utterance for utterance in listed if isinstance(utterance, dict))
    text = next((name for name in _TEXTS if isinstance(first.get(name), str)), None)
    if text is None:
        return None
    speaker = next((name for name in _SPEAKERS if _names_someone(first.get(name))), None)
    if speaker is None:
        speaker = next((name for name in _FLAGS if isinstance(first.get(name), bool)), None)
    if speaker is None:
        unnamed = (utterances, text) == _UNNAMED and not any(name in first for name in _SPEAKERS)
        return Names(utterances=utterances, speaker=None, text=text) if unnamed else None
    if (utterances, speaker) == ("messages", "role") and not _has_sides(listed):
        return None  # a chat: the format `messages`
    return Names(utterances=utterances, speaker=speaker, text=text)


def _is_list(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(_turned(value))
    return isinstance(value, list) and (any(isinstance(one, dict) for one in value) or _are_named(value))


def _as_object(record: Any) -> Any:
    return {"dialog": record} if _are_named(record) else record


def _are_named(value: Any) -> bool:
    """Whether a value is a list of `[speaker, text]`: all speakers are called by their roles, and both sides speak."""
    if not isinstance(value, list) or not all(are_two_texts(one) for one in value):
        return False
    names = {one[0].strip().lower() for one in value}
    roles = {ROLE_NAMES.get(name) for name in names - {_ACTION}}
    return {"user", "assistant"} <= roles and None not in roles


def are_two_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _turned(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An object of equally long lists, as tables hold a list of objects, as that list; empty where it is none."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _elements(value: Any, names: Names) -> tuple[list[Any], list[str]]:
    """The utterances as objects, and what is left out of them."""
    if isinstance(value, dict):
        return _turned(value), []
    if not names.exact:
        return list(value), []
    said = [one for one in value if one[0].strip().lower() != _ACTION]
    left = [f"{names.utterances}[] of the speaker {_ACTION!r}"] * (len(value) - len(said))
    return [{"speaker": speaker, "text": text} for speaker, text in said], left


def _names_someone(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _has_sides(listed: Sequence[Any]) -> bool:
    names = [utterance.get("role") for utterance in listed if isinstance(utterance, dict)]
    return any(isinstance(name, str) and name.lower() in SIDES for name in names)


def _speaker(utterance: Mapping[str, Any], name: str, number: int) -> str:
    value = utterance.get(name)
    if name in _FLAGS and isinstance(value, bool):
        return _FLAGS[name][0 if value else 1]
    if value is None or value == "":
        raise Refused("missing_role", f"utterance {number} has no {name}; expected who speaks")
    if not _names_someone(value):
        raise Refused("invalid_field", f"utterance {number} has {name} {shown(value)}; expected a name or a number")
    return str(value)


def _text(value: Any, names: Names) -> Any:
    return value.strip() if isinstance(value, str) and names.speaker not in _EXACT else value


def _misfit(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Reason and detail for a record that is none of this format."""
    name = next((name for name in _LISTS if name in fields), None)
    if name is None:
        found = f"the record has {', '.join(map(str, fields)) or 'no field'}"
        return "missing_field", f"{found}; expected a list in one of {', '.join(_LISTS)}"
    if fields[name] in ([], None):
        return "no_messages", f"{name} is empty; expected utterances"
    expected = f"objects with who speaks ({', '.join(_SPEAKERS)}) and a text ({', '.join(_TEXTS)})"
    return "invalid_field", f"{name} holds {shown(fields[name])}; expected {expected}"


UTTERANCES = Utterances()
