"""A whole dialogue in one string, its turns told apart by separators or by the names of who speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, take_id
from ismdata.convert.formats.pairs import exchange_of, system_of
from ismdata.convert.formats.speakers import played, spoken
from ismdata.convert.formats.templated import templated_turns, with_calls
from ismdata.errors import Refused, shown

#: Where a record keeps its dialogue; the first one that holds a string is read.
_FIELDS = ("conversation", "dialogue", "dialog", "chat", "text", "input", "plain_text")
_SEPARATOR = "|EOM|"
#: Fields that hold nothing but a dialogue.
_LINED = frozenset({"dialogue", "dialog"})
_LINE = re.compile(r"([^\s:#\[\]][^:\n\[\]]{0,39}|#\w{1,20}#): ?(.*\S)")
_NAMED = re.compile(r"([^:\n]{1,64}):")
#: How turns open where nothing stands between them. The first turn opens the text, blanks aside.
_OPENINGS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"### ?(Human|User|Assistant|System):"),
)


@dataclass(frozen=True, kw_only=True)
class Separated(CorpusFormat):
    """A record is an object with such a string; blanks around a turn's text go."""

    expects: str = "one string with |EOM| between turns `Name: text`, or with Human:/Assistant: before them"
    plain_text: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        if not isinstance(record, dict):
            return False
        text = record.get(_name_of(record))
        try:
            name = _name_of(record)
            turns = turns_of(text, lines=name in _LINED) if isinstance(text, str) else []
        except Refused:
            return False
        return len({speaker for speaker, _ in turns}) > 1

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        name = _name_of(fields)
        if not name:
            found = f"the record has {', '.join(map(str, fields)) or 'no field'}"
            raise Refused("missing_field", f"{found}; expected a string in one of {', '.join(_FIELDS)}")
        turns = turns_of(fields.pop(name), lines=name in _LINED)
        if not turns:
            raise Refused("no_messages", f"{name} has no turns; expected {self.expects}")
        speakers, texts = zip(*turns, strict=True)
        own, first = take_id(fields), system_of(fields)
        glaive = name == "chat"
        if glaive and first:
            first = [{**first[0], "content": first[0]["content"].removeprefix("SYSTEM:").strip()}]
        return [
            Draft(
                messages=first
                + [with_calls(one) if glaive and one["role"] == "assistant" else one for one in spoken(roles, texts)],
                id=own,
                extra=fields,
                part=part,
            )
            for part, roles in played(speakers, self.roles, self.assistant)
        ]


def turns_of(text: str, *, lines: bool = False) -> list[tuple[str, str]]:
    """Who speaks and what is said, turn by turn; empty where nothing tells turns apart. Raises Refused.

    `lines`: a text whose lines all begin with a name and a colon is a dialogue too.

    >>> turns_of("Human: Hi### 1\\n\\nAssistant: Hello: you!")
    [('Human', 'Hi### 1'), ('Assistant', 'Hello: you!')]
    """
    if _SEPARATOR in text:
        pieces = text.split(_SEPARATOR)
        return [_named(piece, number) for number, piece in enumerate(pieces if pieces[-1].strip() else pieces[:-1], 1)]
    return marked_turns(text) or templated_turns(text) or (_lines(text) if lines else [])


def _lines(text: str) -> list[tuple[str, str]]:
    found = [_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    turns = [(match.group(1), match.group(2)) for match in found if match is not None]
    return turns if len(turns) == len(found) > 1 else []


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
    name = next((name for name in _FIELDS if isinstance(fields.get(name), str)), "")
    # Beside an output the input is a prompt.
    return "" if name == "input" and exchange_of(fields) is not None else name


SEPARATED = Separated()
