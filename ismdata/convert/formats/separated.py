"""A whole dialogue in one string, with separators between its turns or the speaker's name before each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import Draft, fields_of, take_id
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.pairs import find_exchange, take_system
from ismdata.convert.formats.speakers import SpeakerFormat, to_messages
from ismdata.convert.formats.templated import split_templated_turns, with_tool_calls
from ismdata.errors import Refused, shown

#: The field in which a record holds its dialogue; the first one with a string is read.
_FIELDS = ("conversation", "dialogue", "dialog", "chat", "text", "input", "plain_text")
_SEPARATOR = "|EOM|"
#: Fields that hold nothing but a dialogue, so that each line may be a turn.
_LINED = frozenset({"dialogue", "dialog"})
_LINE = re.compile(r"([^\s:#\[\]][^:\n\[\]]{0,39}|#\w{1,20}#): ?(.*\S)")
_NAMED = re.compile(r"([^:\n]{1,64}):")
#: How turns begin if nothing separates them. The first turn begins the text, whitespace aside.
_OPENINGS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"### ?(Human|User|Assistant|System):"),
)


@dataclass(frozen=True, kw_only=True)
class Separated(SpeakerFormat):
    """A record is an object with such a string. Whitespace around a turn's text is removed."""

    expects: str = "one string with |EOM| between turns `Name: text`, or with Human:/Assistant: before them"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        if not isinstance(record, dict):
            return False
        name = _text_field(record)
        try:
            turns = split_turns(record[name], lines=name in _LINED) if name else []
        except Refused:
            return False
        return len({speaker for speaker, _ in turns}) > 1

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        name = _text_field(fields)
        if not name:
            raise missing_field(fields, f"a string in one of {', '.join(_FIELDS)}")
        turns = split_turns(fields.pop(name), lines=name in _LINED)
        if not turns:
            raise Refused("no_messages", f"{name} has no turns; expected {self.expects}")
        speakers, texts = zip(*turns, strict=True)
        own_id, system = take_id(fields), take_system(fields)
        glaive = name == "chat"
        if glaive and system:
            system = [{**system[0], "content": system[0]["content"].removeprefix("SYSTEM:").strip()}]
        drafts = []
        for part, roles in self.roles_of(speakers):
            messages = to_messages(roles, texts)
            if glaive:
                messages = [with_tool_calls(one) if one["role"] == "assistant" else one for one in messages]
            drafts.append(Draft(messages=system + messages, id=own_id, extra=fields, id_suffix=part))
        return drafts


def split_turns(text: str, *, lines: bool = False) -> list[tuple[str, str]]:
    """The speaker and the text of each turn; an empty list if nothing separates turns. Raises Refused.

    `lines`: a text in which every line begins with a name and a colon is a dialogue too.

    >>> split_turns("Human: Hi### 1\\n\\nAssistant: Hello: you!")
    [('Human', 'Hi### 1'), ('Assistant', 'Hello: you!')]
    """
    if _SEPARATOR in text:
        pieces = text.split(_SEPARATOR)
        turns = pieces if pieces[-1].strip() else pieces[:-1]
        return [_named_turn(piece, number) for number, piece in enumerate(turns, 1)]
    return split_marked_turns(text) or split_templated_turns(text) or (_split_lines(text) if lines else [])


def _split_lines(text: str) -> list[tuple[str, str]]:
    found = [_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    turns = [(match.group(1), match.group(2)) for match in found if match is not None]
    return turns if len(turns) == len(found) > 1 else []


def split_marked_turns(text: str) -> list[tuple[str, str]]:
    """`split_turns` only for texts such as "Human: …" and "### Human: …"."""
    for opening in _OPENINGS:
        found = list(opening.finditer(text))
        if found and not text[: found[0].start()].strip():
            ends = [*(match.start() for match in found[1:]), len(text)]
            return [(match.group(1), text[match.end() : end].strip()) for match, end in zip(found, ends, strict=True)]
    return []


def _named_turn(piece: str, number: int) -> tuple[str, str]:
    piece = piece.strip()
    match = _NAMED.match(piece)
    if match is None:
        raise Refused("missing_role", f"turn {number} is {shown(piece)}; expected `Name: text`")
    return match.group(1).strip(), piece[match.end() :].strip()


def _text_field(fields: Mapping[str, Any]) -> str:
    """The field that holds the dialogue, "" if there is none."""
    name = next((name for name in _FIELDS if isinstance(fields.get(name), str)), "")
    # Beside an output, the input is a prompt.
    return "" if name == "input" and find_exchange(fields) is not None else name


SEPARATED = Separated()
