"""Rows of a table, each an utterance with its dialogue's id and its speaker's name, as in MELD's CSV files."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ismdata.choices import Paths
from ismdata.convert.corpus_format import Block, Draft, Place, fields_of, kind_of
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.speakers import SpeakerFormat, to_messages
from ismdata.convert.formats.threads import is_chain, thread_drafts
from ismdata.convert.sources.grouping import group_by_key, sort_rows
from ismdata.errors import Refused, shown

#: The usual column names, in lower case and without anything but letters; the first one present is read.
_DIALOGUES = (
    "dialogueid", "dialogid", "conversationid", "convid", "conversationno", "sessionid", "threadid", "thread",
    "session", "conv", "chatid", "talkid", "conversationuuid", "sessionuuid", "threaduuid", "root", "rootid",
)  # fmt: skip
_ORDERS = ("transcriptindex", "utteranceid", "utteranceidx", "turnid", "turnidx", "turn", "order", "index", "position")
_SPEAKERS = ("role", "speaker", "author", "from", "sender", "speakeridx", "speakerid", "speakername", "caller", "user")
_TEXTS = ("utterance", "text", "content", "message")

#: The columns of EmpatheticDialogues, whose texts spell the comma as `_comma_`.
_EMPATHETIC = frozenset({"conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance"})


@dataclass(frozen=True, kw_only=True)
class RowColumns:
    """The names of the columns. Without `order`, rows stay in the order of the file."""

    dialogue: str
    order: str | None
    speaker: str
    text: str


@dataclass(frozen=True, kw_only=True)
class DialogueRows(SpeakerFormat):
    """A record is the list of the rows of one dialogue. If they name their parents, it may have branches."""

    tree: Paths = "all"

    @property
    def expects(self) -> str:
        return "rows of dialogue_id, turn, speaker, text"

    def matches(self, record: Any) -> bool:
        columns = find_columns(record)
        if columns is None:
            return False
        speaker, text = record[columns.speaker], record[columns.text]
        return id_text(record[columns.dialogue]) is not None and isinstance(speaker, str) and isinstance(text, str)

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        yield from group_by_key(blocks, _dialogue_of)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = rows_of(record)
        columns = _required_columns(rows[0])
        rows = sort_rows(rows, columns.order)
        if not is_chain(rows):
            meta = other_cells(rows, {columns.order, columns.speaker, columns.text})[0]
            return thread_drafts(rows, (columns.speaker, columns.text), self, self.tree, meta)
        speakers = [speaker_name(row.get(columns.speaker), number) for number, row in enumerate(rows, 1)]
        extra, ignored = other_cells(rows, {columns.dialogue, columns.order, columns.speaker, columns.text})
        texts = [row.get(columns.text) for row in rows]
        if rows[0].keys() >= _EMPATHETIC:
            texts = [text.replace("_comma_", ",") if isinstance(text, str) else text for text in texts]
        return [
            Draft(
                messages=to_messages(roles, texts),
                id=id_text(rows[0].get(columns.dialogue)),
                extra=extra,
                ignored=ignored,
                id_suffix=part,
            )
            for part, roles in self.roles_of(speakers)
        ]


def rows_of(record: Any) -> list[dict[str, Any]]:
    """The rows of a dialogue; a single row is a dialogue too. Raises Refused if there is none, or one is no object."""
    rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
    if not rows:
        raise Refused("no_messages", "the dialogue has no rows")
    return rows


def find_columns(record: Any) -> RowColumns | None:
    """The columns of a row, or None if one is missing.

    >>> find_columns({"Dialogue_ID": "0", "Speaker": "Ann", "Utterance": "Hi"})
    RowColumns(dialogue='Dialogue_ID', order=None, speaker='Speaker', text='Utterance')
    """
    if not isinstance(record, dict) or not all(isinstance(name, str) for name in record):
        return None
    return _columns_among(tuple(record))


@lru_cache(maxsize=256)
def _columns_among(names: tuple[str, ...]) -> RowColumns | None:
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(re.sub(r"[\W_]+", "", name.lower()), name)

    def first(known: Sequence[str]) -> str | None:
        return next((plain[name] for name in known if name in plain), None)

    dialogue, speaker, text = first(_DIALOGUES), first(_SPEAKERS), first(_TEXTS)
    if dialogue is None or speaker is None or text is None:
        return None
    return RowColumns(dialogue=dialogue, order=first(_ORDERS), speaker=speaker, text=text)


def _required_columns(row: dict[str, Any]) -> RowColumns:
    columns = find_columns(row)
    if columns is None:
        raise missing_field(row, "columns such as dialogue_id, speaker and text")
    return columns


def _dialogue_of(row: Any) -> Hashable:
    fields = fields_of(row)
    return dialogue_id(fields, _required_columns(fields).dialogue)


def dialogue_id(row: dict[str, Any], column: str) -> Hashable:
    """The id that the rows of one dialogue share. Raises Refused if the row has none."""
    name = id_text(row.get(column))
    if name is None:
        raise Refused("missing_field", f"{column} is {shown(row.get(column))}; expected the id of a dialogue")
    return name


def id_text(value: Any) -> str | None:
    """A string or number that can be an id, as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return None
    return str(value) if not isinstance(value, int) or abs(value) < 1 << 64 else None


def speaker_name(value: Any, number: int) -> str:
    """The name of the speaker of message `number`. Raises Refused if there is none."""
    if value is None or value == "":
        raise Refused("missing_role", f"message {number} has no speaker; expected a name")
    name = id_text(value)
    if name is None:
        raise Refused("invalid_field", f"the speaker of message {number} is {kind_of(value)}; expected a name")
    return name


def other_cells(rows: Sequence[dict[str, Any]], used: Iterable[str | None]) -> tuple[dict[str, Any], list[str]]:
    """The cells outside the columns `used`.

    Returns:
        The cells that are equal in all rows, for `meta`, and the column name of each other cell that is not empty.
    """
    first, done = rows[0], set(used)
    extra = {
        name: value
        for name, value in first.items()
        if name not in done and all(name in row and row[name] == value for row in rows)
    }
    done |= extra.keys()
    return extra, [name for row in rows for name, value in row.items() if name not in done and value not in (None, "")]


DIALOGUE_ROWS = DialogueRows()
