"""Lists of strings: a record is its utterances and nothing else, speakers alternate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ismdata.readers.base import Block, Columns, Draft, Reader, Refused, Side, fields_of, kind_of, take_id
from ismdata.readers.columnar import flat_list, mask, per_record
from ismdata.readers.speakers import alternating, spoken, turns

#: Where an object keeps such a list, as Parquet files and saved datasets do; the first one present is read. Not in
#: "turns", see below.
_FIELDS = ("messages", "dialog", "dialogue", "conversation", "conversations", "utterances")
#: Where benchmarks keep what one speaker says, the questions or the answers: half of a dialogue.
_ONE_SIDED = ("turns", "choices")
_SCHEMA = pa.schema([("messages", pa.list_(pa.string()))])


@dataclass(frozen=True, kw_only=True)
class Lists(Reader):
    """A record is a list of strings, or an object with such a list; the opener is the user."""

    expects: str = "[text, text, …], or an object with such a list as its dialog"
    plain_text: bool = False
    assistant: Side = "second"

    def fits(self, record: Any) -> bool:
        listed = record if isinstance(record, list) else _listed(record)[1]
        return _are_texts(listed) or _one_sided(record) is not None

    def drafts(self, record: Any) -> Sequence[Draft]:
        fields: dict[str, Any] = {}
        listed = record
        if not isinstance(record, list):
            fields = dict(fields_of(record))
            name, listed = _listed(fields)
            half = None if name else _one_sided(fields)
            if half is not None:
                raise Refused(
                    "missing_role",
                    f"{half!r} has only one speaker's turns, as the questions or the answers of a benchmark; expected "
                    "both sides. Where the speakers alternate, call the list 'dialog'",
                )
            if not isinstance(listed, list):
                found = f"the record has {', '.join(fields) or 'no field'}"
                raise Refused("missing_field", f"{found}; expected a list of strings in one of {', '.join(_FIELDS)}")
            del fields[name]
        for number, text in enumerate(listed, 1):
            if not isinstance(text, str):
                raise Refused("invalid_content", f"message {number} is {kind_of(text)}; expected a string")
        own = take_id(fields)
        return [
            Draft(messages=spoken(roles, listed), id=own, extra=fields, part=part)
            for part, roles in alternating(len(listed), self.assistant)
        ]

    def columns(self, block: Block) -> Columns | None:
        table = None if self.assistant == "both" else block.table(_SCHEMA, wrapped=True)
        if table is None:
            return None
        offsets, contents = flat_list(table["messages"])
        care = (np.diff(offsets) == 0) | per_record(mask(contents.is_null()), offsets)
        return Columns(ids=None, offsets=offsets, roles=turns(offsets, self.assistant), contents=contents, care=care)


def _listed(fields: Any) -> tuple[str, Any]:
    name = next((name for name in _FIELDS if name in fields), "") if isinstance(fields, dict) else ""
    return name, fields[name] if name else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _one_sided(record: Any) -> str | None:
    """The name of the field that holds one side of a dialogue only: `turns`, or `choices` with such turns inside."""
    for name in _ONE_SIDED:
        held = record.get(name) if isinstance(record, dict) else None
        if _are_texts(held) and name == "turns":
            return name
        if (
            isinstance(held, list)
            and held
            and all(isinstance(one, dict) and _are_texts(one.get("turns")) for one in held)
        ):
            return name
    return None


LISTS = Lists()
