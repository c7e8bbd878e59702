"""Lists of strings: a record is its utterances and nothing else, speakers alternate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.columnar import flat_list, mask, per_record
from ismdata.convert.corpus_format import ID_FIELDS, Block, Columns, CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.speakers import alternating, played, spoken, turns
from ismdata.errors import Refused

#: Where an object keeps such a list, as Parquet files and saved datasets do; the first one present is read. Not in
#: "turns", see below.
_FIELDS = ("messages", "dialog", "dialogue", "conversation", "conversations", "utterances")
#: Names that say little: a list under them is a dialogue where the record has an id.
_WITH_ID = ("data", "content")
#: Where a list stands beside that says who speaks, one name for each utterance.
_SPEAKERS = ("speakers", "speaker")
#: Beside these two fields `turns` has both sides, the bot's first: MetaLWOz.
_BOT_OPENS = frozenset({"bot_id", "user_id"})
#: Where benchmarks keep what one speaker says, the questions or the answers: half of a dialogue.
_ONE_SIDED = ("turns", "choices")
_SCHEMA = pa.schema([("messages", pa.list_(pa.string()))])


@dataclass(frozen=True, kw_only=True)
class Lists(CorpusFormat):
    """A record is a list of strings, or an object with such a list; the opener is the user."""

    expects: str = "[text, text, …], or an object with such a list as its dialog"
    plain_text: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: ROLE_NAMES)
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        listed = record if isinstance(record, list) else _listed(record)[1]
        return _are_texts(listed) or _one_sided(record) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields: dict[str, Any] = {}
        name, listed = "", record
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
            for part, roles in self._played(len(listed), name, fields)
        ]

    def _played(self, count: int, name: str, fields: dict[str, Any]) -> Sequence[tuple[str, Sequence[str]]]:
        """Who says which of the utterances; what tells that is taken out of `fields`."""
        if name == "turns":
            return [("", alternating(count, "first")[0][1])]
        beside = next((one for one in _SPEAKERS if _are_texts(fields.get(one))), None)
        if beside is None:
            return alternating(count, self.assistant)
        speakers = fields.pop(beside)
        if len(speakers) != count:
            found = f"{beside} has {len(speakers)} names for {count} utterances"
            raise Refused("invalid_field", f"{found}; expected one for each")
        return played(speakers, self.roles, self.assistant)

    def parse_block(self, block: Block) -> Columns | None:
        table = None if self.assistant == "both" else block.table(_SCHEMA, wrapped=True)
        if table is None:
            return None
        offsets, contents = flat_list(table["messages"])
        care = (np.diff(offsets) == 0) | per_record(mask(contents.is_null()), offsets)
        return Columns(ids=None, offsets=offsets, roles=turns(offsets, self.assistant), contents=contents, care=care)


def _listed(fields: Any) -> tuple[str, Any]:
    if not isinstance(fields, dict):
        return "", None
    name = next((name for name in _FIELDS if name in fields), "")
    if not name and any(one in fields for one in ID_FIELDS):
        name = next((name for name in _WITH_ID if _are_texts(fields.get(name))), "")
    if not name and fields.keys() >= _BOT_OPENS and _are_texts(fields.get("turns")):
        name = "turns"
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
