"""Guess a mapping from the first records of a corpus of unknown shape.

The heuristics: the list with the most text holds the messages, the field with the most text the content, and a field
with few different short values the speaker. Rows with a repeated id are grouped. A string with separators between turns
is split at them.
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
from ismdata.convert.formats.mapped import ANYONE, EACH, WHOLE, Mapped, Utterance, value_at, values_at
from ismdata.convert.formats.speakers import assign_roles
from ismdata.convert.sources.blocks import ValueBlock
from ismdata.convert.sources.grouping import GroupBlock
from ismdata.errors import Refused

#: The depth to which a list of messages is searched in a record.
_DEPTH = 4
#: The most records inside an object that are examined.
_MOST_EXAMINED = 20
#: The most characters of a speaker's name.
_NAME_LENGTH = 40
#: Separators of turns in a string, the most specific first.
_SEPARATORS = ("|EOM|", "__eou__", "<eou>", "<|endoftext|>", "<|im_end|>", "[SEP]", "</s>", " ||| ", "\n\n", "\n", "\t")
_NAMED_TURN = re.compile(r"\s*[#*]{0,3} ?([^\W_][\w .'-]{0,30}?): ")
#: Where the answer to a list of messages may be.
_ANSWERS = (
    "output", "response", "answer", "completion", "target", "reply", "chosen_response", "output.message",
    "response.message", "response.choices.0.message", "outputs.choices.0.message", "completion.choices.0.message",
)  # fmt: skip
_SYSTEM = ("system", "system_prompt", "meta_instruction")
#: Pairs of fields that hold the two sides of an exchange.
_SIDES = (
    ("human", "assistant"), ("user", "assistant"), ("human", "bot"), ("user", "bot"), ("human", "gpt"),
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("prompt", "completion"),
    ("prompt", "response"), ("instruction", "output"), ("instruction", "response"), ("input", "output"),
    ("post", "reply"), ("source", "target"), ("context", "response"), ("q", "a"),
)  # fmt: skip


def guess_mapping(records: Sequence[Any]) -> Mapped | None:
    """The mapping that fits the records best, None if no messages are found in them."""
    paths = {_path_of_records(record) for record in records}
    path = paths.pop() if len(paths) == 1 else None
    if path is None:
        return _guess(records)
    found = _guess([inner for record in records for inner in values_at(record, path)])
    return None if found is None or found.group else replace(found, records=path)


def _guess(records: Sequence[Any]) -> Mapped | None:
    """`guess_mapping` for records that hold no others."""
    found = next((one for one in _candidates(records) if one is not None and _reads_any(one, records)), None)
    if found is None:
        return None
    dialogues = [_utterances(found, record) for record in regroup_records(found, records)]
    texts = [utterance.message["content"] for dialogue in dialogues for utterance in dialogue]
    speakers = [[one.speaker for one in dialogue if one.speaker is not None] for dialogue in dialogues]
    return replace(
        found,
        strip=any(isinstance(text, str) and text != text.strip() for text in texts),
        roles={} if found.exchange else _guess_roles(speakers),
        system=None if found.group else next((name for name in _SYSTEM if _holds_text(records, name)), None),
        id=None if found.group else _id_field(records),
        answer=_answer_path(found, records, speakers),
    )


def _answer_path(mapping: Mapped, records: Sequence[Any], speakers: Sequence[Sequence[str]]) -> str | None:
    """The path of an answer beside lists of messages of which none ends with the assistant."""
    ends = {ROLE_NAMES.get(names[-1].strip().lower()) for names in speakers if names}
    if mapping.messages is None or mapping.content is None or ends - {"user", "tool"} or not ends:
        return None
    for path in _ANSWERS:
        found = [value_at(record, path) for record in records]
        messages = all(isinstance(value, dict) and isinstance(value.get(mapping.content), str) for value in found)
        if found and (messages or all(isinstance(value, str) for value in found)):
            return path
    return None


def _holds_text(records: Sequence[Any], name: str) -> bool:
    """Whether a field holds nothing but text, and some."""
    values = [record.get(name) for record in records if isinstance(record, dict)]
    return any(values) and all(value is None or isinstance(value, str) for value in values)


def _reads_any(mapping: Mapped, records: Sequence[Any]) -> bool:
    return any(_utterances(mapping, record) for record in regroup_records(mapping, records))


@dataclass(frozen=True, kw_only=True)
class GuessedFormat(CorpusFormat):
    """A format that reads each record by a mapping guessed from that record alone. It finds records to explain."""

    @property
    def expects(self) -> str:
        return "anything that holds messages"

    def matches(self, record: Any) -> bool:
        return _path_of_records(record) is None and guess_mapping([record]) is not None

    def parse_record(self, record: Any) -> Sequence[Draft]:
        found = guess_mapping([record])
        if found is None:
            raise Refused("not_an_object", "no messages were found in the record")
        return found.parse_record(record)


def _path_of_records(value: Any) -> str | None:
    """The path of the records in an object: by id, all with the same fields, or in lists by split; None for others."""
    if not isinstance(value, dict) or not value:
        return None
    inner, path = [*value.values()], EACH
    if all(isinstance(one, list) and one and isinstance(one[0], dict | list) for one in inner):
        inner, path = [one[0] for one in inner], f"{EACH}.{EACH}"
    elif len(inner) < 2 or not all(isinstance(one, dict) and one.keys() == inner[0].keys() for one in inner):
        return None
    guesses = [_guess([one]) for one in inner[:_MOST_EXAMINED]]
    # A list of exchanges, each a record in itself, is a conversation.
    return path if all(one is not None and one.messages != WHOLE for one in guesses) else None


def _candidates(records: Sequence[Any]) -> Iterator[Mapped | None]:
    """Mappings in the order in which they are tried."""
    yield _guess_list(records)
    rows = [record for record in records if isinstance(record, dict)]
    if rows and len(rows) == len(records):
        yield _guess_group(rows)
        yield from (_guess_exchange(rows, sides) for sides in _SIDES)
        yield _guess_text(rows)
    elif records and all(isinstance(record, str) for record in records):
        yield _guess_separator(WHOLE, list(records))


def _guess_list(records: Sequence[Any]) -> Mapped | None:
    """A mapping of the list of messages or exchanges that holds the most text, over all records."""
    found: dict[str, list[list[Any]]] = {}
    for record in records:
        for path, listed in _lists(record, ""):
            found.setdefault(path or WHOLE, []).append(listed)
    ranked = []
    for path, lists in found.items():
        elements = [element for listed in lists for element in listed]
        mapping = _guess_elements(path, elements)
        if mapping is not None:
            several = sum(len(listed) > 1 for listed in lists)
            ranked.append((several > 0 or bool(mapping.exchange), _text_length(mapping, elements), mapping))
    return max(ranked, key=lambda one: one[:2])[2] if ranked else None


def _lists(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, list[Any]]]:
    """Paths and elements of all lists in a record, of lists in lists, and of objects with numbered objects in them."""
    if isinstance(value, list):
        if value:
            yield path, value
        if value and all(isinstance(inner, list) for inner in value):
            objects = [element for inner in value for element in inner if isinstance(element, dict)]
            yield f"{path}.{EACH}" if path else EACH, objects
    elif isinstance(value, dict) and depth < _DEPTH:
        if len(value) > 1 and all(isinstance(inner, dict) for inner in value.values()) and all(map(_has_digit, value)):
            yield path, list(value.values())
        for name, inner in value.items():
            if isinstance(name, str) and name and name != WHOLE:
                yield from _lists(inner, f"{path}.{name}" if path else name, depth + 1)


def _guess_elements(path: str, elements: list[Any]) -> Mapped | None:
    """A mapping of a list, given the elements of all such lists."""
    if all(isinstance(element, str) for element in elements):
        return Mapped(messages=path)
    if all(isinstance(element, list) and len(element) == 2 for element in elements) and path != WHOLE:
        are_texts = all(isinstance(text, str) for pair in elements for text in pair)
        return Mapped(messages=path, exchange=("0", "1")) if are_texts else None
    objects = [element for element in elements if isinstance(element, dict)]
    if not objects or len(objects) < len(elements):
        return None
    texts = _text_fields(objects)
    if not texts:
        return None
    for sides in _SIDES:
        fields = _side_fields(objects, sides)
        if fields is not None:
            return Mapped(messages=path, exchange=fields)
    role = _role_field(objects)
    contents = [name for name in texts if name != role]
    return Mapped(messages=path, role=role, content=contents[0]) if contents else None


def _text_fields(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths of the fields that hold text in most objects, the one with the most text first."""
    counts: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for fields in objects:
        for path, text in _texts(fields, ""):
            counts[path] += 1
            lengths[path] += len(text)
    usual = [path for path in lengths if 2 * counts[path] > len(objects)]
    return sorted(usual, key=lambda path: (-lengths[path], path))


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Paths and values of the strings in an object and in the objects directly inside it."""
    for name, inner in value.items():
        if not isinstance(name, str) or not name:
            continue
        if isinstance(inner, str):
            yield path + name, inner
        elif isinstance(inner, dict) and not path:
            yield from _texts(inner, f"{name}.")


def _role_field(objects: Sequence[Mapping[str, Any]]) -> str | None:
    """The path of the speaker: values that are known roles, or short values that alternate between messages."""
    best: tuple[float, str] | None = None
    names = dict.fromkeys(name for fields in objects for name in fields if isinstance(name, str) and name)
    for path in [*names, *dict.fromkeys(path for fields in objects for path, _ in _texts(fields, ""))]:
        values = [id_text(value_at(fields, path)) for fields in objects]
        speakers = [value for value in values if value is not None and len(value) <= _NAME_LENGTH]
        if len(speakers) < len(objects) or not speakers:
            continue
        distinct = set(speakers)
        known = sum(value.strip().lower() in ROLE_NAMES for value in speakers) / len(speakers)
        changes = sum(one != other for one, other in pairwise(speakers)) / max(1, len(speakers) - 1)
        named = bool(re.search(r"role|speaker|author|sender|agent|from|who|party|side|\bby\b", path.lower()))
        if known < 0.5 and not (1 < len(distinct) <= max(2, len(speakers) // 3) and (changes > 0.3 or named)):
            continue
        score = 4 * known + 2 * named + changes - len(distinct) / len(speakers)
        if best is None or score > best[0]:
            best = (score, path)
    return best[1] if best else None


def _guess_group(rows: list[dict[str, Any]]) -> Mapped | None:
    """A mapping of rows that are messages: by their usual column names, else by a repeated id."""
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
            return Mapped(group=name, order=_order_column(rows, {name, role, content}), role=role, content=content)
    return None


def _order_column(rows: list[dict[str, Any]], taken: set[str | None]) -> str | None:
    """A column of numbers whose name suggests an order."""
    for name in rows[0]:
        if name and name not in taken and re.search(r"turn|idx|index|order|pos|num|seq|^no?\b|utt", name.lower()):
            values = [id_text(row.get(name)) for row in rows]
            if all(value is not None and re.fullmatch("[0-9]{1,9}", value) for value in values):
                return name
    return None


def _side_fields(objects: Sequence[Mapping[str, Any]], sides: tuple[str, str]) -> tuple[str, str] | None:
    """The two fields of the objects that have the names of the sides of an exchange, in any case."""
    names = {name.lower(): name for name in objects[0] if isinstance(name, str)}
    if not all(side in names for side in sides):
        return None
    first, second = (names[side] for side in sides)
    are_texts = all(isinstance(objects[0].get(name), str) for name in (first, second))
    return (first, second) if are_texts else None


def _guess_exchange(rows: list[dict[str, Any]], sides: tuple[str, str]) -> Mapped | None:
    fields = _side_fields(rows, sides)
    return Mapped(messages=WHOLE, exchange=fields) if fields is not None else None


def _guess_text(rows: list[dict[str, Any]]) -> Mapped | None:
    """A mapping of one of the three fields with the most text, if that has separators between turns."""
    for name in _text_fields(rows)[:3]:
        texts = [text for text in (value_at(row, name) for row in rows) if isinstance(text, str)]
        found = _guess_separator(name, texts)
        if found is not None:
            return found
    return None


def _guess_separator(path: str, texts: list[str]) -> Mapped | None:
    """A mapping with the first separator in most of the texts. Whitespace counts only if each turn names a speaker."""
    for separator in _SEPARATORS:
        separated = [text for text in texts if separator in text.strip()]
        if 2 * len(separated) <= len(texts):
            continue
        pieces = [piece for text in separated for piece in text.split(separator) if piece.strip()]
        named = sum(_NAMED_TURN.match(piece) is not None for piece in pieces)
        if named == len(pieces):
            return Mapped(text=path, separator=separator, speaker_separator=": ")
        if not separator.isspace():
            return Mapped(text=path, separator=separator)
    return None


def _utterances(mapping: Mapped, record: Any) -> list[Utterance]:
    """The messages of a record before they have roles, none if it is refused."""
    try:
        return mapping.utterances(record)
    except Refused:
        return []


def regroup_records(mapping: Mapped, records: Sequence[Any]) -> Iterator[Any]:
    """The records as the mapping groups them. Rows without a group are left out."""
    block = ValueBlock(values=list(records), numbers=np.arange(1, len(records) + 1))
    for part, _ in mapping.regroup([(block, Place(prefix="", stem=""))]):
        if isinstance(part, GroupBlock):
            part = GroupBlock(groups=[group for group in part.groups if group.refusal is None])
        yield from (part.record(row) for row in range(len(part.numbers)))


def _guess_roles(dialogues: Sequence[Sequence[str]]) -> dict[str, str]:
    """Roles for unknown names of speakers: two names, or one name in (almost) all dialogues and any other."""
    names = dict.fromkeys(name.strip() for dialogue in dialogues for name in dialogue)
    unknown = [name for name in names if name.lower() not in ROLE_NAMES]
    try:
        found = assign_roles(list(names), ROLE_NAMES, "second")[0][1]
    except Refused:
        counts = Counter(name for dialogue in dialogues for name in {speaker.strip() for speaker in dialogue})
        common = [name for name in unknown if counts[name] >= 0.9 * len(dialogues)]
        return {common[0].lower(): "assistant", ANYONE: "user"} if len(common) == 1 and len(dialogues) > 1 else {}
    return {name.lower(): role for name, role in found.items() if ROLE_NAMES.get(name.lower()) != role}


def _id_field(records: Sequence[Any]) -> str | None:
    """A field with the name of an id and a different value in each record, if no field has one of the usual names."""
    rows = [record for record in records if isinstance(record, dict)]
    if len(rows) < 2 or any(name in rows[0] for name in ID_FIELDS):
        return None
    for name in rows[0]:
        values = [id_text(row.get(name)) for row in rows]
        named = isinstance(name, str) and re.search(r"(^|_)id$|[a-z]I[dD]$|^qid$", name) is not None
        if named and None not in values and len(set(values)) == len(values):
            return str(name)
    return None


def _has_digit(name: Any) -> bool:
    return isinstance(name, str) and re.search("[0-9]", name) is not None


def _text_length(mapping: Mapped, elements: Sequence[Any]) -> int:
    """Characters of the messages in a list."""
    names = mapping.exchange or ((mapping.content or WHOLE),)
    texts = (value_at(element, name) for element in elements for name in names)
    return sum(len(text) for text in texts if isinstance(text, str))
