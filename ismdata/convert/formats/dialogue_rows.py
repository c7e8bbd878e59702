"""Rows of a table, each an utterance with the id of its dialogue and the name of its speaker, as MELD's CSV files."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of
from ismdata.convert.formats.speakers import played
from ismdata.convert.sources.grouping import by_key, in_order
from ismdata.errors import Refused, shown

#: The usual names of the columns, without regard to case and to what is no letter; the first one present is read.
_DIALOGUES = ("dialogueid", "dialogid", "conversationid", "convid", "sessionid", "threadid")
_ORDERS = ("utteranceid", "utteranceidx", "turnid", "turnidx", "turn", "order", "index", "position")
_SPEAKERS = ("role", "speaker", "author", "from", "sender", "speakeridx", "speakerid", "speakername")
_TEXTS = ("utterance", "text", "content", "message")


#: The columns of EmpatheticDialogues, whose texts have a word for the comma.
_EMPATHETIC = frozenset({"conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance"})


@dataclass(frozen=True, kw_only=True)
class RowColumns:
    """Which column holds what; without an `order` rows come as they stand."""

    dialogue: str
    order: str | None
    speaker: str
    text: str


@dataclass(frozen=True, kw_only=True)
class DialogueRows(CorpusFormat):
    """A record is the list of the rows of one dialogue."""

    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    @property
    def expects(self) -> str:
        return "rows of dialogue_id, turn, speaker, text"

    def matches(self, record: Any) -> bool:
        columns = columns_of(record)
        if columns is None:
            return False
        speaker, text = record[columns.speaker], record[columns.text]
        return cell_id(record[columns.dialogue]) is not None and isinstance(speaker, str) and isinstance(text, str)

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        yield from by_key(blocks, _dialogue)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        if not rows:
            raise Refused("no_messages", "the dialogue has no rows")
        columns = _expected_columns(rows[0])
        rows = in_order(rows, columns.order)
        speakers = [speaker_of(row.get(columns.speaker), number) for number, row in enumerate(rows, 1)]
        used = {columns.dialogue, columns.order, columns.speaker, columns.text}
        extra, ignored = shared(rows, used)
        texts = [row.get(columns.text) for row in rows]
        if rows[0].keys() >= _EMPATHETIC:
            texts = [text.replace("_comma_", ",") if isinstance(text, str) else text for text in texts]
        return [
            Draft(
                messages=[{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)],
                id=cell_id(rows[0].get(columns.dialogue)),
                extra=extra,
                ignored=ignored,
                part=part,
            )
            for part, roles in played(speakers, self.roles, self.assistant)
        ]


def columns_of(record: Any) -> RowColumns | None:
    """The columns that a row has, or None when one is missing.

    >>> columns_of({"Dialogue_ID": "0", "Speaker": "Ann", "Utterance": "Hi"})
    RowColumns(dialogue='Dialogue_ID', order=None, speaker='Speaker', text='Utterance')
    """
    if not isinstance(record, dict) or not all(isinstance(name, str) for name in record):
        return None
    return _columns(tuple(record))


@lru_cache(maxsize=256)
def _columns(names: tuple[str, ...]) -> RowColumns | None:
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(re.sub(r"[\W_]+", "", name.lower()), name)

    def first(known: Sequence[str]) -> str | None:
        return next((plain[name] for name in known if name in plain), None)

    dialogue, speaker, text = first(_DIALOGUES), first(_SPEAKERS), first(_TEXTS)
    if dialogue is None or speaker is None or text is None:
        return None
    return RowColumns(dialogue=dialogue, order=first(_ORDERS), speaker=speaker, text=text)


def _expected_columns(row: dict[str, Any]) -> RowColumns:
    columns = columns_of(row)
    if columns is None:
        found = f"the row has {', '.join(map(str, row)) or 'nothing'}"
        raise Refused("missing_field", f"{found}; expected columns such as dialogue_id, speaker and text")
    return columns


def _dialogue(row: Any) -> Hashable:
    fields = fields_of(row)
    return group_of(fields, _expected_columns(fields).dialogue)


def group_of(row: dict[str, Any], column: str) -> Hashable:
    """What rows of one dialogue have in common. Raises Refused when a row does not say."""
    name = cell_id(row.get(column))
    if name is None:
        raise Refused("missing_field", f"{column} is {shown(row.get(column))}; expected the id of a dialogue")
    return name


def cell_id(value: Any) -> str | None:
    """A text or number that can name something, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return None
    return str(value) if not isinstance(value, int) or abs(value) < 1 << 64 else None


def speaker_of(value: Any, number: int) -> str:
    """Who speaks message `number`. Raises Refused when that is not said."""
    if value is None or value == "":
        raise Refused("missing_role", f"message {number} does not say who speaks; expected a name")
    name = cell_id(value)
    if name is None:
        raise Refused("invalid_field", f"the speaker of message {number} is {kind_of(value)}; expected a name")
    return name


def shared(rows: Sequence[dict[str, Any]], used: Iterable[str | None]) -> tuple[dict[str, Any], list[str]]:
    """What all rows of a dialogue say alike, for its `meta`, and the names of the other cells, once for each."""
    first, done = rows[0], set(used)
    extra = {
        name: value
        for name, value in first.items()
        if name not in done and all(name in row and row[name] == value for row in rows)
    }
    done |= extra.keys()
    return extra, [name for row in rows for name, value in row.items() if name not in done and value not in (None, "")]


DIALOGUE_ROWS = DialogueRows()
