"""A mapping to start from, guessed from the first records of a corpus of unknown shape.

The longest list of objects is the messages, the field with the most text in it the content, a field with few different
short values the role; rows with an id that comes again are grouped; a string with marks between turns is cut at them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import ID_FIELDS, CorpusFormat, Draft, Place
from ismdata.convert.formats.dialogue_rows import find_columns, id_text
from ismdata.convert.formats.mapped import ANYONE, WHOLE, Mapped, Utterance, value_at
from ismdata.convert.formats.speakers import assign_roles
from ismdata.convert.sources.blocks import ValueBlock
from ismdata.convert.sources.grouping import GroupBlock
from ismdata.errors import Refused

#: How deep in a record a list of messages is looked for.
_DEPTH = 4
#: A role is a short text that few different speakers have.
_ROLE_LENGTH = 40
#: What stands between turns in one string, the surest first.
_SEPARATORS = ("|EOM|", "__eou__", "<eou>", "<|endoftext|>", "<|im_end|>", "[SEP]", "</s>", " ||| ", "\n\n", "\n", "\t")
_NAMED_TURN = re.compile(r"\s*[#*]{0,3} ?([^\W_][\w .'-]{0,30}?): ")
_SYSTEM = ("system", "system_prompt", "meta_instruction")
#: Fields that hold the two sides of an exchange, as pairs that go together.
_SIDES = (
    ("human", "assistant"), ("user", "assistant"), ("human", "bot"), ("user", "bot"), ("human", "gpt"),
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("prompt", "completion"),
    ("prompt", "response"), ("instruction", "output"), ("instruction", "response"), ("input", "output"),
    ("post", "reply"), ("source", "target"), ("context", "response"), ("q", "a"),
)  # fmt: skip


def guess_mapping(records: Sequence[Any]) -> Mapped | None:
    """The mapping that fits the records best, or None when no messages can be made out in them."""
    found = next((one for one in _candidates(records) if one is not None and _reads_some(one, records)), None)
    if found is None:
        return None
    talks = [_said(found, record) for record in regroup_records(found, records)]
    texts = [said.message["content"] for talk in talks for said in talk]
    strip = any(isinstance(text, str) and text != text.strip() for text in texts)
    speakers = [[said.speaker for said in talk if said.speaker is not None] for talk in talks]
    roles = {} if found.exchange else _roles(speakers)
    system = None if found.group else next((name for name in _SYSTEM if _all_text(records, name)), None)
    return replace(found, strip=strip, roles=roles, system=system, id=None if found.group else _id_field(records))


def _all_text(records: Sequence[Any], name: str) -> bool:
    values = [record.get(name) for record in records if isinstance(record, dict)]
    return any(values) and all(value is None or isinstance(value, str) for value in values)


def _reads_some(mapped: Mapped, records: Sequence[Any]) -> bool:
    return any(_said(mapped, record) for record in regroup_records(mapped, records))


@dataclass(frozen=True, kw_only=True)
class GuessedFormat(CorpusFormat):
    """Each record as the mapping says that is guessed from it alone: what an unknown corpus is looked at with."""

    @property
    def expects(self) -> str:
        return "anything that holds messages"

    def matches(self, record: Any) -> bool:
        return guess_mapping([record]) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        found = guess_mapping([record])
        if found is None:
            raise Refused("not_an_object", "no messages can be made out in the record")
        return found.parse_record(record)


def _candidates(records: Sequence[Any]) -> Iterator[Mapped | None]:
    """Mappings in the order in which they are tried."""
    yield _listed(records)
    rows = [record for record in records if isinstance(record, dict)]
    if rows and len(rows) == len(records):
        yield _grouped(rows)
        yield from (_exchanged(rows, sides) for sides in _SIDES)
        yield _cut(rows)
    elif records and all(isinstance(record, str) for record in records):
        yield _one_string(WHOLE, list(records))


def _listed(records: Sequence[Any]) -> Mapped | None:
    """The list of messages or exchanges that holds the most text, over all records."""
    found: dict[str, list[list[Any]]] = {}
    for record in records:
        for path, listed in _lists(record, ""):
            found.setdefault(path or WHOLE, []).append(listed)
    ranked = []
    for path, lists in found.items():
        elements = [element for listed in lists for element in listed]
        mapped = _of_elements(path, elements)
        if mapped is not None:
            several = sum(len(listed) > 1 for listed in lists)
            ranked.append((several > 0 or bool(mapped.exchange), _amount(mapped, elements), mapped))
    return max(ranked, key=lambda one: one[:2])[2] if ranked else None


def _lists(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, list[Any]]]:
    """All lists in a record that can be lists of messages, with their paths; numbered objects in an object too."""
    if isinstance(value, list):
        if value:
            yield path, value
    elif isinstance(value, dict) and depth < _DEPTH:
        if len(value) > 1 and all(isinstance(inner, dict) for inner in value.values()) and all(map(_numbered, value)):
            yield path, list(value.values())
        for name, inner in value.items():
            if isinstance(name, str) and name and name != WHOLE:
                yield from _lists(inner, f"{path}.{name}" if path else name, depth + 1)


def _of_elements(path: str, elements: list[Any]) -> Mapped | None:
    if all(isinstance(element, str) for element in elements):
        return Mapped(messages=path)
    if all(isinstance(element, list) and len(element) == 2 for element in elements) and path != WHOLE:
        both = all(isinstance(text, str) for pair in elements for text in pair)
        return Mapped(messages=path, exchange=("0", "1")) if both else None
    objects = [element for element in elements if isinstance(element, dict)]
    if not objects or len(objects) < len(elements):
        return None
    texts = _text_fields(objects)
    if not texts:
        return None
    for sides in _SIDES:
        named = _named_sides(objects, sides)
        if named is not None:
            return Mapped(messages=path, exchange=named)
    role = _role_field(objects)
    contents = [name for name in texts if name != role]
    return Mapped(messages=path, role=role, content=contents[0]) if contents else None


def _text_fields(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths of the fields that hold text in most objects, the one with the most text first."""
    held: Counter[str] = Counter()
    amount: Counter[str] = Counter()
    for fields in objects:
        for path, text in _texts(fields, ""):
            held[path] += 1
            amount[path] += len(text)
    usual = [path for path in amount if 2 * held[path] > len(objects)]
    return sorted(usual, key=lambda path: (-amount[path], path))


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The strings in an object and in the objects right inside of it, with their paths."""
    for name, inner in value.items():
        if not isinstance(name, str) or not name:
            continue
        if isinstance(inner, str):
            yield path + name, inner
        elif isinstance(inner, dict) and not path:
            yield from _texts(inner, f"{name}.")


def _role_field(objects: Sequence[Mapping[str, Any]]) -> str | None:
    """The field that says who speaks: known role names, else a short value that changes from message to message."""
    best: tuple[float, str] | None = None
    names = dict.fromkeys(name for fields in objects for name in fields if isinstance(name, str) and name)
    for path in [*names, *dict.fromkeys(path for fields in objects for path, _ in _texts(fields, ""))]:
        values = [id_text(value_at(fields, path)) for fields in objects]
        said = [value for value in values if value is not None and len(value) <= _ROLE_LENGTH]
        if len(said) < len(objects) or not said:
            continue
        kinds = set(said)
        known = sum(value.strip().lower() in ROLE_NAMES for value in said) / len(said)
        changes = sum(one != other for one, other in pairwise(said)) / max(1, len(said) - 1)
        named = bool(re.search(r"role|speaker|author|sender|agent|from|who|party|side", path.lower()))
        if known < 0.5 and not (1 < len(kinds) <= max(2, len(said) // 3) and (changes > 0.3 or named)):
            continue
        score = 4 * known + 2 * named + changes - len(kinds) / len(said)
        if best is None or score > best[0]:
            best = (score, path)
    return best[1] if best else None


def _grouped(rows: list[dict[str, Any]]) -> Mapped | None:
    """Rows that belong together by an id: the usual column names, else an id that comes again and a role."""
    columns = find_columns(rows[0])
    if columns is not None:
        return Mapped(group=columns.dialogue, order=columns.order, role=columns.speaker, content=columns.text)
    role = _role_field(rows)
    texts = [name for name in _text_fields(rows) if name != role]
    for name in rows[0]:
        values = [id_text(row.get(name)) for row in rows]
        groups = set(values)
        runs = 1 + sum(one != other for one, other in pairwise(values))
        content = next((text for text in texts if text != name), None)
        if not name or name == role or None in groups or content is None or not 1 <= len(groups) <= len(rows) // 2:
            continue
        if runs == len(groups) and re.search(r"id$|dial|conv|sess|thread|chat|talk", name.lower()):
            return Mapped(group=name, order=_order(rows, {name, role, content}), role=role, content=content)
    return None


def _order(rows: list[dict[str, Any]], taken: set[str | None]) -> str | None:
    for name in rows[0]:
        if name and name not in taken and re.search(r"turn|idx|index|order|pos|num|seq|^no?\b|utt", name.lower()):
            values = [id_text(row.get(name)) for row in rows]
            if all(value is not None and re.fullmatch("[0-9]{1,9}", value) for value in values):
                return name
    return None


def _named_sides(objects: Sequence[Mapping[str, Any]], sides: tuple[str, str]) -> tuple[str, str] | None:
    """The two fields of each object that are called like the sides of an exchange, in any case."""
    names = {name.lower(): name for name in objects[0] if isinstance(name, str)}
    if not all(side in names for side in sides):
        return None
    first, second = (names[side] for side in sides)
    whole = all(isinstance(fields.get(name), str) for fields in objects[:1] for name in (first, second))
    return (first, second) if whole else None


def _exchanged(rows: list[dict[str, Any]], sides: tuple[str, str]) -> Mapped | None:
    named = _named_sides(rows, sides)
    return Mapped(messages=WHOLE, exchange=named) if named is not None else None


def _cut(rows: list[dict[str, Any]]) -> Mapped | None:
    """The field with the most text, where it is cut by marks that stand between turns."""
    for name in _text_fields(rows)[:3]:
        texts = [text for text in (value_at(row, name) for row in rows) if isinstance(text, str)]
        found = _one_string(name, texts)
        if found is not None:
            return found
    return None


def _one_string(path: str, texts: list[str]) -> Mapped | None:
    """A string cut at the first separator that most of the texts have; line breaks count where each names a speaker."""
    for separator in _SEPARATORS:
        holding = [text for text in texts if separator in text.strip()]
        if 2 * len(holding) <= len(texts):
            continue
        pieces = [piece for text in holding for piece in text.split(separator) if piece.strip()]
        named = sum(_NAMED_TURN.match(piece) is not None for piece in pieces)
        if named == len(pieces):
            return Mapped(text=path, separator=separator, speaker_separator=": ")
        if not separator.isspace():
            return Mapped(text=path, separator=separator)
    return None


def _said(mapped: Mapped, record: Any) -> list[Utterance]:
    """The messages of a record before roles are given; none where it is refused."""
    try:
        return mapped.utterances(record)
    except Refused:
        return []


def regroup_records(mapped: Mapped, records: Sequence[Any]) -> Iterator[Any]:
    """Records as the mapping takes them: rows that belong together as one. Rows that do not say where are left out."""
    block = ValueBlock(values=list(records), numbers=np.arange(1, len(records) + 1))
    for part, _ in mapped.regroup([(block, Place(prefix="", stem=""))]):
        if isinstance(part, GroupBlock):
            part = GroupBlock(groups=[group for group in part.groups if group.refusal is None])
        yield from (part.record(row) for row in range(len(part.numbers)))


def _roles(talks: Sequence[Sequence[str]]) -> dict[str, str]:
    """Roles for the names that have none: of two speakers, or of one whom all talks have and whoever else there is."""
    names = dict.fromkeys(name.strip() for talk in talks for name in talk)
    unknown = [name for name in names if name.lower() not in ROLE_NAMES]
    try:
        found = assign_roles(list(names), ROLE_NAMES, "second")[0][1]
    except Refused:
        usual = Counter(name for talk in talks for name in {speaker.strip() for speaker in talk})
        always = [name for name in unknown if usual[name] >= 0.9 * len(talks)]
        return {always[0].lower(): "assistant", ANYONE: "user"} if len(always) == 1 and len(talks) > 1 else {}
    return {name.lower(): role for name, role in found.items() if ROLE_NAMES.get(name.lower()) != role}


def _id_field(records: Sequence[Any]) -> str | None:
    """A field that names records, where it is not one of the usual ones: called like an id, and different in each."""
    rows = [record for record in records if isinstance(record, dict)]
    if len(rows) < 2 or any(name in rows[0] for name in ID_FIELDS):
        return None
    for name in rows[0]:
        values = [id_text(row.get(name)) for row in rows]
        called = isinstance(name, str) and re.search(r"(^|_)id$|[a-z]I[dD]$|^qid$", name) is not None
        if called and None not in values and len(set(values)) == len(values):
            return str(name)
    return None


def _numbered(name: Any) -> bool:
    return isinstance(name, str) and re.search("[0-9]", name) is not None


def _amount(mapped: Mapped, elements: Sequence[Any]) -> int:
    """How much text a list would give."""
    names = mapped.exchange or ((mapped.content or WHOLE),)
    texts = (value_at(element, name) for element in elements for name in names)
    return sum(len(text) for text in texts if isinstance(text, str))
