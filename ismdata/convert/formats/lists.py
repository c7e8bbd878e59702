"""Lists of strings: a record is its utterances and nothing else; the speakers alternate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.convert.columnar import any_per_record, as_bools, flat_list
from ismdata.convert.corpus_format import ID_FIELDS, Block, Columns, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import is_texts, missing_field, take_system_prompts
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
#: A name before a text. Such a name has no punctuation that ends a sentence, and no URL follows.
_MARK = r"^\s*[^\s:：][^:：\n.?!,;]{0,39}[:：]"
_NAMED = re.compile(r"\s*([^\s:：.?!,;\d][^:：\n.?!,;]{0,39})[:：](?!//)\s*(.*?)\s*", re.DOTALL)
#: What stands before a colon in a text, and is no name.
_NO_NAMES = frozenset(
    {
        "note",
        "warning",
        "tip",
        "hint",
        "example",
        "ps",
        "fyi",
        "re",
        "http",
        "https",
        "important",
        "update",
        "edit",
        "step",
    }
)
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
        system = [{"role": "system", "content": text} for text in take_system_prompts(fields)]
        named = None
        if name != "turns" and not any(is_texts(fields.get(one)) for one in _SPEAKERS):
            named = split_names(listed, self.roles)
        sides = self._roles_in(fields, name, len(listed)) if named is None else self.roles_of([one for one, _ in named])
        texts = listed if named is None else [text for _, text in named]
        return [
            Draft(messages=system + to_messages(roles, texts), id=own_id, extra=fields, id_suffix=part)
            for part, roles in sides
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
        fallback |= any_per_record(as_bools(pc.fill_null(pc.match_substring_regex(contents, _MARK), False)), offsets)
        roles = alternating_role_column(offsets, self.assistant)
        return Columns(ids=None, offsets=offsets, roles=roles, contents=contents, fallback=fallback)


def split_names(texts: Sequence[str], roles: Mapping[str, str]) -> list[tuple[str, str]] | None:
    """The speaker and the text of each utterance if all begin with names, as in "Ann: Hi"; None if they do not.

    Raises Refused if only some of them begin with a user's and an assistant's name.

    >>> split_names(["Ann: Hi", "Bo: Hi: you"], {}), split_names(["Note: Hi", "Ann: Hi"], {})
    ([('Ann', 'Hi'), ('Bo', 'Hi: you')], None)
    """
    found = [_NAMED.fullmatch(text) for text in texts]
    turns = [(match[1].strip(), match[2]) for match in found if match is not None]
    names = dict.fromkeys(name.lower() for name, _ in turns)
    known = {roles[name] for name in names if name in roles}
    if len(turns) == len(texts):
        sounds = all(name in roles or (name not in _NO_NAMES and len(name.split()) < 4) for name in names)
        return turns if sounds and (known or len(names) == 2 or 2 < len(names) < len(texts)) else None
    if {"user", "assistant"} <= known:
        number = found.index(None) + 1
        raise Refused(
            "missing_role",
            f"message {number} has no speaker before it, as in 'user: …', and others have; expected one in all",
        )
    return None


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
