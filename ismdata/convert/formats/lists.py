"""Lists of strings: a record is its utterances and nothing else; the speakers alternate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ismdata.convert.columnar import any_per_record, as_bools, flat_list
from ismdata.convert.corpus_format import ID_FIELDS, Block, Columns, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.speakers import SpeakerFormat, alternating_role_column, alternating_roles, to_messages
from ismdata.errors import Refused

#: Fields in which an object, such as a row of Parquet, holds such a list; the first one present is read. Not "turns",
#: see below.
_FIELDS = ("messages", "dialog", "dialogue", "conversation", "conversations", "utterances")
#: Less specific names: a list under them is a dialogue only if the record has an id.
_WITH_ID = ("data", "content")
#: A list of names beside it, one per utterance, says who speaks.
_SPEAKERS = ("speakers", "speaker")
#: Beside these two fields, `turns` has both sides and the bot speaks first: MetaLWOz.
_BOT_OPENS = frozenset({"bot_id", "user_id"})
#: Fields in which benchmarks hold only one side of a dialogue: the questions or the answers.
_ONE_SIDED = ("turns", "choices")
_SCHEMA = pa.schema([("messages", pa.list_(pa.string()))])


@dataclass(frozen=True, kw_only=True)
class Lists(SpeakerFormat):
    """A record is a list of strings, or an object with such a list; the first speaker is the user."""

    expects: str = "[text, text, …], or an object with such a list as its dialog"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        listed = record if isinstance(record, list) else _find_list(record)[1]
        return _is_texts(listed) or _one_sided_field(record) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields: dict[str, Any] = {}
        name, listed = "", record
        if not isinstance(record, list):
            fields = dict(fields_of(record))
            name, listed = _find_list(fields)
            half = None if name else _one_sided_field(fields)
            if half is not None:
                raise Refused(
                    "missing_role",
                    f"{half!r} has only one speaker's turns, as the questions or answers of a benchmark; expected both "
                    "sides. If the speakers alternate in it, name the list 'dialog'",
                )
            if not isinstance(listed, list):
                raise missing_field(fields, f"a list of strings in one of {', '.join(_FIELDS)}")
            del fields[name]
        for number, text in enumerate(listed, 1):
            if not isinstance(text, str):
                raise Refused("invalid_content", f"message {number} is {kind_of(text)}; expected a string")
        own_id = take_id(fields)
        return [
            Draft(messages=to_messages(roles, listed), id=own_id, extra=fields, id_suffix=part)
            for part, roles in self._roles_in(fields, name, len(listed))
        ]

    def _roles_in(self, fields: dict[str, Any], name: str, count: int) -> Sequence[tuple[str, Sequence[str]]]:
        """The role of each of `count` utterances in the list `name`; removes the list of speakers from `fields`."""
        if name == "turns":
            return [("", alternating_roles(count, "first")[0][1])]
        beside = next((one for one in _SPEAKERS if _is_texts(fields.get(one))), None)
        if beside is None:
            return alternating_roles(count, self.assistant)
        speakers = fields.pop(beside)
        if len(speakers) != count:
            found = f"{beside} has {len(speakers)} names for {count} utterances"
            raise Refused("invalid_field", f"{found}; expected one per utterance")
        return self.roles_of(speakers)

    def parse_block(self, block: Block) -> Columns | None:
        table = None if self.assistant == "both" else block.table(_SCHEMA, wrapped=True)
        if table is None:
            return None
        offsets, contents = flat_list(table["messages"])
        fallback = (np.diff(offsets) == 0) | any_per_record(as_bools(contents.is_null()), offsets)
        roles = alternating_role_column(offsets, self.assistant)
        return Columns(ids=None, offsets=offsets, roles=roles, contents=contents, fallback=fallback)


def _find_list(fields: Any) -> tuple[str, Any]:
    """The field that holds the list, "" if there is none, and its value."""
    if not isinstance(fields, dict):
        return "", None
    name = next((name for name in _FIELDS if name in fields), "")
    if not name and any(one in fields for one in ID_FIELDS):
        name = next((name for name in _WITH_ID if _is_texts(fields.get(name))), "")
    if not name and fields.keys() >= _BOT_OPENS and _is_texts(fields.get("turns")):
        name = "turns"
    return name, fields[name] if name else None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _one_sided_field(record: Any) -> str | None:
    """The field that holds only one side of a dialogue: `turns`, or `choices` with such turns in it."""
    for name in _ONE_SIDED:
        value = record.get(name) if isinstance(record, dict) else None
        if _is_texts(value) and name == "turns":
            return name
        if (
            isinstance(value, list)
            and value
            and all(isinstance(one, dict) and _is_texts(one.get("turns")) for one in value)
        ):
            return name
    return None


LISTS = Lists()
