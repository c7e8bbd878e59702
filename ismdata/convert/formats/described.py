"""Corpora of task-oriented dialogue that a mapping describes, and two that need a little more.

A shape that one mapping reads is a line in `SHAPES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from ismdata.convert.corpus_format import Block, Choices, Draft, Place, kind_of, take_id, with_choices
from ismdata.convert.formats.fields import listed_names
from ismdata.convert.formats.mapped import Mapped, value_at, values_at
from ismdata.convert.formats.speakers import SpeakerFormat, alternating_roles, to_messages
from ismdata.convert.sources.grouping import expand_records
from ismdata.errors import Refused

#: The mapping of each corpus, and the fields of which the first message has one with a text.
SHAPES: dict[str, tuple[Mapped, tuple[str, ...]]] = {
    "KVRET": (
        Mapped(messages="dialogue", role="turn", content="data.utterance", roles={"driver": "user"}),
        ("data.utterance",),
    ),
    "CamRest": (
        Mapped(
            messages="dial",
            exchange=("usr.transcript", "sys.sent"),
            roles={"usr.transcript": "user", "sys.sent": "assistant"},
        ),
        ("usr.transcript",),
    ),
    "Sim-M and Sim-R": (
        Mapped(
            messages="turns",
            exchange=("system_utterance.text", "user_utterance.text"),
            roles={"system_utterance.text": "assistant", "user_utterance.text": "user"},
        ),
        ("user_utterance.text", "system_utterance.text"),
    ),
    "IMCS": (
        Mapped(messages="dialogue", role="speaker", content="sentence", roles={"患者": "user", "医生": "assistant"}),
        ("sentence",),
    ),
    "Doc2Dial": (
        Mapped(records="dial_data.*.*.*", messages="turns", role="role", content="utterance"),
        ("utterance",),
    ),
}
#: Fields of BlendedSkillTalk: the first two utterances, then those of either side.
_OPENING, _SIDES = "previous_utterance", ("free_messages", "guided_messages")
#: An utterance of DREAM: the speaker's initials, a colon and the text.
_NAMED = re.compile(r"([^\W\d_][\w .]{0,19}): ?(.*\S)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Described(SpeakerFormat):
    """A record is of one of `SHAPES`, of BlendedSkillTalk or of DREAM."""

    expects: str = "the records of KVRET, CamRest, Sim-M, IMCS, Doc2Dial, BlendedSkillTalk or DREAM"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return _is_dream(record) or _is_blended(record) or _shape_of(record) is not None

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        return expand_records(blocks, _inner_records)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if _is_dream(record):
            return self._dream(record)
        if _is_blended(record):
            return self._blended(dict(record))
        shape = _shape_of(record, inner=True)
        if shape is None:
            found = f"has the fields {listed_names(record)}" if isinstance(record, dict) else f"is {kind_of(record)}"
            raise Refused("missing_field", f"the record {found}; expected {self.expects}")
        named = {name: role for name, role in shape.roles.items() if name not in self.roles}
        choices = Choices(roles={**self.roles, **named}, assistant=self.assistant)
        drafts = with_choices(replace(shape, records=None), choices).parse_record(record)
        return [
            replace(
                draft,
                messages=[{**one, "role": named.get(str(one["role"]).lower(), one["role"])} for one in draft.messages],
            )
            for draft in drafts
        ]

    def _blended(self, fields: dict[str, Any]) -> Sequence[Draft]:
        opening, *sides = (fields.pop(name, None) or [] for name in (_OPENING, *_SIDES))
        if not all(_are_texts(one) for one in (opening, *sides)):
            raise Refused("invalid_field", f"{_OPENING}, {' and '.join(_SIDES)} are expected to be lists of strings")
        texts = [*opening, *(text for text in chain(*zip_longest(*sides)) if text is not None)]
        own_id = take_id(fields)
        return [
            Draft(messages=to_messages(roles, texts), id=own_id, extra=fields, id_suffix=part)
            for part, roles in alternating_roles(len(texts), self.assistant)
        ]

    def _dream(self, record: list[Any]) -> Sequence[Draft]:
        turns = [_NAMED.fullmatch(text.strip()) for text in record[0]]
        named = [(turn.group(1), turn.group(2)) for turn in turns if turn is not None]
        if len(named) < len(turns):
            raise Refused("missing_role", "an utterance has no speaker; expected `W: text`")
        speakers, texts = zip(*named, strict=True)
        return [
            Draft(messages=to_messages(roles, texts), id=record[2], extra={"questions": record[1]}, id_suffix=part)
            for part, roles in self.roles_of(speakers)
        ]


def _shape_of(record: Any, *, inner: bool = False) -> Mapped | None:
    """The mapping of a record, None if it is of no shape. `inner`: records inside records are looked for too."""
    for mapping, fields in SHAPES.values():
        inside = values_at(record, mapping.records) if mapping.records else [record]
        if inner and mapping.records and not inside:
            inside = [record]
        if any(_begins_with(one, mapping, fields) for one in inside):
            return mapping
    return None


def _begins_with(record: Any, mapping: Mapped, fields: Sequence[str]) -> bool:
    listed = value_at(record, mapping.messages) if isinstance(record, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    return isinstance(first, dict) and any(isinstance(value_at(first, name), str) for name in fields)


def _inner_records(record: Any) -> list[Any]:
    shape = _shape_of(record)
    return values_at(record, shape.records) if shape is not None and shape.records else []


def _is_blended(record: Any) -> bool:
    return isinstance(record, Mapping) and all(_are_texts(record.get(name)) for name in _SIDES)


def _is_dream(record: Any) -> bool:
    return (
        isinstance(record, list)
        and len(record) == 3
        and bool(record[0])
        and _are_texts(record[0])
        and isinstance(record[1], list)
        and all(isinstance(one, dict) and "question" in one for one in record[1])
        and isinstance(record[2], str)
        and _NAMED.fullmatch(record[0][0].strip()) is not None
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


DESCRIBED = Described()
