"""Transcripts: lists of utterances with the name of who speaks, as dialogue research publishes its corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.conversation import ROLE_NAMES
from ismdata.readers.base import Draft, Reader, Refused, Side, fields_of, kind_of, shown, take_id
from ismdata.readers.speakers import alternating, played

#: Where a record keeps its utterances; the first one present is read.
_LISTS = ("utterances", "dialog", "dialogue", "turns", "log", "content", "messages", "conversation")
#: Who speaks, and what is said: the first name present of each.
_SPEAKERS = ("speaker", "agent", "role", "author", "sender")
_TEXTS = ("text", "utterance", "content", "message")
#: The list whose speakers take turns unnamed, as in MultiWOZ before its version 2.2.
_UNNAMED = ("log", "text")
#: In `messages[].role/content` only these names tell a transcript from a chat: there "sys" gives the answers.
_SIDES = frozenset({"usr", "sys"})
#: Under these names texts are taken as they are; transcripts of people typing or talking end in stray blanks.
_EXACT = frozenset({"role"})


@dataclass(frozen=True, kw_only=True)
class Names:
    """Which fields hold the list, who speaks (None: the speakers alternate) and what is said."""

    utterances: str
    speaker: str | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Utterances(Reader):
    """A record is an object with a list of `{speaker, text}` under the usual names of such fields."""

    expects: str = "utterances[].speaker/text and the like, log[].text"
    plain_text: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    def fits(self, record: Any) -> bool:
        return names_of(record) is not None

    def drafts(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        names = names_of(record)
        if names is None:
            raise Refused(*_misfit(fields))
        listed = fields.pop(names.utterances)
        for number, utterance in enumerate(listed, 1):
            if not isinstance(utterance, dict):
                raise Refused("not_an_object", f"utterance {number} is {kind_of(utterance)}; expected an object")
        contents = [_text(utterance.get(names.text), names) for utterance in listed]
        used = {names.speaker, names.text}
        ignored = [
            f"{names.utterances}[].{name}"
            for utterance in listed
            for name, value in utterance.items()
            if name not in used and value is not None
        ]
        own = take_id(fields)
        if names.speaker is None:
            sides = alternating(len(listed), self.assistant)
        else:
            speakers = [_speaker(utterance, names.speaker, number) for number, utterance in enumerate(listed, 1)]
            sides = played(speakers, self.roles, self.assistant)
        return [
            Draft(
                messages=[{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)],
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
    first = next(utterance for utterance in record[utterances] if isinstance(utterance, dict))
    text = next((name for name in _TEXTS if isinstance(first.get(name), str)), None)
    if text is None:
        return None
    speaker = next((name for name in _SPEAKERS if _names_someone(first.get(name))), None)
    if speaker is None:
        unnamed = (utterances, text) == _UNNAMED and not any(name in first for name in _SPEAKERS)
        return Names(utterances=utterances, speaker=None, text=text) if unnamed else None
    if (utterances, speaker) == ("messages", "role") and not _has_sides(record[utterances]):
        return None  # a chat: the format `messages`
    return Names(utterances=utterances, speaker=speaker, text=text)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(utterance, dict) for utterance in value)


def _names_someone(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _has_sides(listed: Sequence[Any]) -> bool:
    names = [utterance.get("role") for utterance in listed if isinstance(utterance, dict)]
    return any(isinstance(name, str) and name.lower() in _SIDES for name in names)


def _speaker(utterance: Mapping[str, Any], name: str, number: int) -> str:
    value = utterance.get(name)
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
