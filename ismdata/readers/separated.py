"""A whole dialogue in one string, its turns told apart by separators or by the names of who speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.conversation import ROLE_NAMES
from ismdata.readers.base import Draft, Reader, Refused, Side, fields_of, shown, take_id
from ismdata.readers.speakers import played, spoken

#: Where a record keeps its dialogue; the first one that holds a string is read.
_FIELDS = ("conversation", "dialogue", "dialog", "text")
_SEPARATOR = "|EOM|"
_NAMED = re.compile(r"([^:\n]{1,64}):")
#: How turns open where nothing stands between them. The first turn opens the text, blanks aside.
_OPENINGS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"### ?(Human|User|Assistant|System):"),
)


@dataclass(frozen=True, kw_only=True)
class Separated(Reader):
    """A record is an object with such a string; blanks around a turn's text go."""

    expects: str = "one string with |EOM| between turns `Name: text`, or with Human:/Assistant: before them"
    plain_text: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    def fits(self, record: Any) -> bool:
        if not isinstance(record, dict):
            return False
        text = record.get(_name_of(record))
        try:
            turns = turns_of(text) if isinstance(text, str) else []
        except Refused:
            return False
        return len({speaker for speaker, _ in turns}) > 1

    def drafts(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        name = _name_of(fields)
        if not name:
            found = f"the record has {', '.join(map(str, fields)) or 'no field'}"
            raise Refused("missing_field", f"{found}; expected a string in one of {', '.join(_FIELDS)}")
        turns = turns_of(fields.pop(name))
        if not turns:
            raise Refused("no_messages", f"{name} has no turns; expected {self.expects}")
        speakers, texts = zip(*turns, strict=True)
        own = take_id(fields)
        return [
            Draft(messages=spoken(roles, texts), id=own, extra=fields, part=part)
            for part, roles in played(speakers, self.roles, self.assistant)
        ]


def turns_of(text: str) -> list[tuple[str, str]]:
    """Who speaks and what is said, turn by turn; empty where nothing tells turns apart. Raises Refused.

    >>> turns_of("Human: Hi### 1\\n\\nAssistant: Hello: you!")
    [('Human', 'Hi### 1'), ('Assistant', 'Hello: you!')]
    """
    if _SEPARATOR in text:
        pieces = text.split(_SEPARATOR)
        return [_named(piece, number) for number, piece in enumerate(pieces if pieces[-1].strip() else pieces[:-1], 1)]
    return marked_turns(text)


def marked_turns(text: str) -> list[tuple[str, str]]:
    """As `turns_of`, of texts such as "Human: …" and "### Human: …" alone."""
    for opening in _OPENINGS:
        found = list(opening.finditer(text))
        if found and not text[: found[0].start()].strip():
            ends = [*(match.start() for match in found[1:]), len(text)]
            return [(match.group(1), text[match.end() : end].strip()) for match, end in zip(found, ends, strict=True)]
    return []


def _named(piece: str, number: int) -> tuple[str, str]:
    piece = piece.strip()
    match = _NAMED.match(piece)
    if match is None:
        raise Refused("missing_role", f"turn {number} is {shown(piece)}; expected `Name: text`")
    return match.group(1).strip(), piece[match.end() :].strip()


def _name_of(fields: Mapping[str, Any]) -> str:
    return next((name for name in _FIELDS if isinstance(fields.get(name), str)), "")


SEPARATED = Separated()
