"""Transcripts: lists of utterances with the speaker's name, as dialogue research publishes its corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import (
    is_columns,
    missing_field,
    refuse_files,
    rows_of_columns,
    take_system_prompts,
)
from ismdata.convert.formats.messages import OPENAI, SIDES
from ismdata.convert.formats.speakers import SpeakerFormat, alternating_roles, to_messages
from ismdata.convert.formats.threads import check_one_path
from ismdata.errors import Refused, shown

#: The field in which a record holds its utterances; the first one present is read.
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
#: The speaker and the text of an utterance: the first name present of each.
_SPEAKERS = ("speaker", "agent", "role", "author", "sender", "speaker_role", "speaker_name", "speaker_id", "user")
_TEXTS = ("text", "utterance", "content", "message")
#: The speaker as a boolean: the role if it is true, and if it is false.
_FLAGS = {
    "is_human": ("user", "assistant"),
    "is_user": ("user", "assistant"),
    "from_user": ("user", "assistant"),
    "is_bot": ("assistant", "user"),
    "is_assistant": ("assistant", "user"),
}
#: The "speaker" of entries in `[speaker, text]` lists that are an agent's actions, not utterances.
_ACTION = "action"
#: The list whose speakers alternate and have no names: MultiWOZ before version 2.2.
_UNNAMED = ("log", "text")
#: The fields beside which a record's `context` is the system prompt: chats of PaLM.
_PALM = ("messages", "author")
#: Speaker fields beside which texts are kept as they are. Transcripts of people have stray whitespace at the ends.
_EXACT = frozenset({"role"})


@dataclass(frozen=True, kw_only=True)
class Names:
    """The fields of the list, of the speaker (None: the speakers alternate) and of the text.

    `exact`: each utterance is a list `[speaker, text]`.
    """

    utterances: str
    speaker: str | None
    text: str
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Utterances(SpeakerFormat):
    """A record is an object with a list of `{speaker, text}`, under the usual names of such fields."""

    expects: str = "utterances[].speaker/text and the like, log[].text"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        record = _as_object(record)
        names = find_names(record)
        return names is not None and (names.utterances == "messages" or not OPENAI.matches(record))

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(_as_object(record)))
        names = find_names(fields)
        if names is None:
            raise _no_utterances(fields)
        listed, ignored = _elements(fields.pop(names.utterances), names)
        for number, utterance in enumerate(listed, 1):
            if not isinstance(utterance, dict):
                raise Refused("not_an_object", f"utterance {number} is {kind_of(utterance)}; expected an object")
            refuse_files(utterance, number)
        check_one_path(listed)
        contents = [_text(utterance.get(names.text), names) for utterance in listed]
        used = {names.speaker, names.text}
        ignored += [
            f"{names.utterances}[].{name}"
            for utterance in listed
            for name, value in utterance.items()
            if name not in used and value is not None
        ]
        own_id = take_id(fields)
        context = fields.get("context") if (names.utterances, names.speaker) == _PALM else None
        systems = [fields.pop("context")] if isinstance(context, str) and context else []
        system = [{"role": "system", "content": text} for text in (*systems, *take_system_prompts(fields, systems))]
        if names.speaker is None:
            sides = alternating_roles(len(listed), self.assistant)
        else:
            speakers = [_speaker(utterance, names.speaker, number) for number, utterance in enumerate(listed, 1)]
            sides = self.roles_of(speakers)
        return [
            Draft(
                messages=system + to_messages(roles, contents), id=own_id, extra=fields, ignored=ignored, id_suffix=part
            )
            for part, roles in sides
        ]


def find_names(record: Any) -> Names | None:
    """The names of the fields in a record, or None if it holds no such list.

    >>> find_names({"dialog": [{"speaker": "Ann", "text": "Hi"}]})
    Names(utterances='dialog', speaker='speaker', text='text', exact=False)
    """
    if not isinstance(record, dict):
        return None
    utterances = next((name for name in _LISTS if _is_list(record.get(name))), None)
    if utterances is None:
        return None
    listed = record[utterances]
    if _is_exact_list(listed):
        return Names(utterances=utterances, speaker="speaker", text="text", exact=True)
    if isinstance(listed, dict):
        listed = _rows(listed)
    first = next(utterance for utterance in listed if isinstance(utterance, dict))
    text = next((name for name in _TEXTS if isinstance(first.get(name), str)), None)
    if text is None:
        return None
    speaker = next((name for name in _SPEAKERS if _is_speaker(first.get(name))), None)
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
        return bool(_rows(value))
    return isinstance(value, list) and (any(isinstance(one, dict) for one in value) or _is_exact_list(value))


def _as_object(record: Any) -> Any:
    return {"dialog": record} if _is_exact_list(record) else record


def _is_exact_list(value: Any) -> bool:
    """Whether a value is a list of `[speaker, text]` in which all speakers are roles, and both sides speak."""
    if not isinstance(value, list) or not all(_is_text_pair(one) for one in value):
        return False
    names = {one[0].strip().lower() for one in value}
    roles = {ROLE_NAMES.get(name) for name in names - {_ACTION}}
    return {"user", "assistant"} <= roles and None not in roles


def _is_text_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The list of objects that an object of equally long lists holds; empty if it is none."""
    if not is_columns(value) or len(set(map(len, value.values()))) > 1:
        return []
    return rows_of_columns(value, "")


def _elements(value: Any, names: Names) -> tuple[list[Any], list[str]]:
    """The utterances as objects, and the names of what is left out."""
    if isinstance(value, dict):
        return _rows(value), []
    if not names.exact:
        return list(value), []
    kept = [one for one in value if one[0].strip().lower() != _ACTION]
    ignored = [f"{names.utterances}[] of the speaker {_ACTION!r}"] * (len(value) - len(kept))
    return [{"speaker": speaker, "text": text} for speaker, text in kept], ignored


def _is_speaker(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _has_sides(listed: Sequence[Any]) -> bool:
    names = [utterance.get("role") for utterance in listed if isinstance(utterance, dict)]
    return any(isinstance(name, str) and name.lower() in SIDES for name in names)


def _speaker(utterance: Mapping[str, Any], name: str, number: int) -> str:
    value = utterance.get(name)
    if name in _FLAGS and isinstance(value, bool):
        return _FLAGS[name][0 if value else 1]
    if value is None or value == "":
        raise Refused("missing_role", f"utterance {number} has no {name}; expected the speaker's name")
    if not _is_speaker(value):
        raise Refused("invalid_field", f"utterance {number} has {name} {shown(value)}; expected a name or a number")
    return str(value)


def _text(value: Any, names: Names) -> Any:
    return value.strip() if isinstance(value, str) and names.speaker not in _EXACT else value


def _no_utterances(fields: Mapping[str, Any]) -> Refused:
    """The refusal of a record that is not of this format."""
    name = next((name for name in _LISTS if name in fields), None)
    if name is None:
        return missing_field(fields, f"a list in one of {', '.join(_LISTS)}")
    if fields[name] in ([], None):
        return Refused("no_messages", f"{name} is empty; expected utterances")
    expected = f"objects with a speaker ({', '.join(_SPEAKERS)}) and a text ({', '.join(_TEXTS)})"
    return Refused("invalid_field", f"{name} is {shown(fields[name])}; expected {expected}")


UTTERANCES = Utterances()
