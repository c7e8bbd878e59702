"""A corpus of any shape, read as a mapping file says; `convert/mapping_file.py` reads that file."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ismdata.choices import Side
from ismdata.conversation import MESSAGE_TYPE, TOOL_CALL_ROLE_NAMES
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of, take_id
from ismdata.convert.formats.dialogue_rows import dialogue_id, id_text, other_cells, rows_of, speaker_name
from ismdata.convert.formats.fields import FILES, is_columns, listed_names, refuse_files, rows_of_columns
from ismdata.convert.formats.speakers import alternating_roles, message_roles, with_roles
from ismdata.convert.sources.grouping import expand_records, group_by_key, sort_rows
from ismdata.convert.training_flags import TRAINING_FLAGS
from ismdata.errors import Refused, shown

#: The path of the record itself.
WHOLE = "."
#: A step of a path that stands for every element of a list and every value of an object.
EACH = "*"
#: A name in the roles that stands for all other names.
ANYONE = "*"

#: Message fields that keep their names, if messages are objects.
_KEPT = frozenset({field.name for field in MESSAGE_TYPE} | {"function_call"} | TRAINING_FLAGS) - {"role", "content"}
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A message whose role is not known yet. `speaker` is None if the speakers only alternate."""

    speaker: str | None
    message: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Mapped(CorpusFormat):
    """A format given by dotted paths. Exactly one of `messages` (a list), `text` (a string), `group` (rows) is set.

    `records` finds conversations inside a record: each becomes a record of its own. `answer` is a text, a message or a
    list of messages after `messages`. `roles` maps role names in lower case to canonical roles; `ANYONE` among them
    stands for all other names.
    """

    records: str | None = None
    messages: str | None = None
    role: str | None = None
    content: str | None = None
    exchange: tuple[str, ...] = ()
    answer: str | None = None
    text: str | None = None
    separator: str = ""
    speaker_separator: str | None = None
    group: str | None = None
    order: str | None = None
    system: str | None = None
    tools: str | None = None
    id: str | None = None
    strip: bool = False
    join: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    assistant: Side = "second"

    @property
    def expects(self) -> str:
        if self.group is not None:
            return f"rows of {', '.join(name for name in (self.group, self.order, self.role, self.content) if name)}"
        if self.text is not None:
            return f"{self.text}, turns separated by {self.separator!r}"
        inner = "/".join(self.exchange) or "/".join(name for name in (self.role, self.content) if name) or "text"
        return f"{self.messages}[].{inner}"

    @property
    def plain_text(self) -> bool:
        return self.text == WHOLE

    def matches(self, record: Any) -> bool:
        if self.records is not None:
            inner = replace(self, records=None)
            return any(inner.matches(one) for one in values_at(record, self.records))
        if self.group is not None:
            return isinstance(record, dict) and self.group in record and value_at(record, self.content) is not _ABSENT
        if self.text is not None:
            return isinstance(value_at(record, self.text), str)
        try:
            elements = self._listed(record)
        except Refused:
            return False
        first = next((element for element in elements if element is not None), None)
        if self.exchange:
            return all(value_at(first, name) is not _ABSENT for name in self.exchange)
        return isinstance(first, str) if self.content is None else value_at(first, self.content) is not _ABSENT

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        if self.records is not None:
            yield from expand_records(blocks, partial(values_at, path=self.records))
        elif self.group is None:
            yield from blocks
        else:
            yield from group_by_key(blocks, partial(_row_group, column=self.group))

    def utterances(self, record: Any) -> list[Utterance]:
        """The messages of a record before they have roles. Raises Refused."""
        return self._split(record, [])[0]

    def _split(self, record: Any, ignored: list[str]) -> tuple[list[Utterance], dict[str, Any]]:
        """The messages of a record and its other fields; adds the names of fields that are left out to `ignored`."""
        if self.group is not None:
            return self._from_rows(record, self.group, ignored)
        if self.text is not None:
            return self._from_text(_required(record, self.text)), remove_at(record, self.text)
        utterances = self._from_elements(self._listed(record), f"{self.messages}[]", ignored)
        fields = remove_at(record, self.messages)
        if self.answer is not None:
            answer, fields = _take_at(fields, self.answer)
            utterances += self._from_answer(answer, ignored)
        if self.messages == WHOLE:  # one exchange: its other fields describe the whole record
            fields = {name: value for name, value in fields.items() if name not in self._message_fields}
        return utterances, fields

    def _listed(self, record: Any) -> Sequence[Any]:
        """The messages or exchanges of a record. Raises Refused."""
        if EACH not in str(self.messages).split("."):
            return self._elements(_required(record, self.messages))
        found = values_at(record, str(self.messages))
        return [element for value in found for element in self._elements(value)]

    def _from_answer(self, answer: Any, ignored: list[str]) -> list[Utterance]:
        """The messages of the answer after the list of messages."""
        if answer is None or isinstance(answer, str):
            return [] if answer is None else [Utterance(speaker="assistant", message={"content": answer})]
        listed = answer if isinstance(answer, list) else [answer]
        if self.content is None or self.exchange:
            raise Refused("invalid_field", f"{self.answer} is {kind_of(answer)}; expected a string")
        return self._from_elements(listed, f"{self.answer}[]", ignored)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        ignored: list[str] = []
        utterances, fields = self._split(record, ignored)
        system, fields = self._system_prompt(fields)
        tools, fields = _take_at(fields, self.tools or "tools")
        own_id, fields = (take_id(fields), fields) if self.id is None else _take_at(fields, self.id)
        whole = Draft(
            messages=(),
            id=own_id if self.id is None else id_text(own_id),
            tools=tools,
            extra=fields,
            ignored=ignored,
        )
        messages = [self._stripped(one.message) for one in utterances]
        return [
            replace(whole, messages=system + with_roles(messages, roles), id_suffix=part)
            for part, roles in self._roles([one.speaker for one in utterances])
        ]

    @property
    def _message_fields(self) -> set[str]:
        """The fields of a message that are read."""
        return {name.split(".")[0] for name in (*self.exchange, self.role, self.content) if name}

    def _elements(self, value: Any) -> Sequence[Any]:
        """The messages or exchanges: a list, an object that is one of them, or an object that holds them by name."""
        if value is None or isinstance(value, list):
            return value or []
        if not isinstance(value, dict):
            raise Refused("invalid_field", f"{self.messages} is {kind_of(value)}; expected a list or an object")
        if self._message_fields and self._message_fields <= value.keys():
            return rows_of_columns(value, str(self.messages)) if is_columns(value) else [value]
        return [value[name] for name in sorted(value, key=_numbers)] if all(map(_numbers, value)) else [*value.values()]

    def _from_elements(self, listed: Sequence[Any], name: str, ignored: list[str]) -> list[Utterance]:
        found: list[Utterance] = []
        for number, element in enumerate(listed, 1):
            if self.exchange:
                texts = {field: value_at(element, field) for field in self.exchange}
                given = {field: text for field, text in texts.items() if text is not _ABSENT and text is not None}
                if not given:
                    raise Refused(
                        "missing_field", f"{name} {number} is {shown(element)}; expected {', '.join(self.exchange)}"
                    )
                found += [Utterance(speaker=field, message={"content": text}) for field, text in given.items()]
                if isinstance(element, dict) and name != f"{WHOLE}[]":
                    ignored += _other_names(element, self._message_fields, name)
            elif self.content is None:
                if not isinstance(element, str):
                    raise Refused("invalid_content", f"message {number} is {kind_of(element)}; expected a string")
                found.append(Utterance(speaker=None, message={"content": element}))
            else:
                fields = fields_of(element)
                if self.content not in FILES:
                    refuse_files(fields, number)
                message = {kept: fields[kept] for kept in _KEPT - self._message_fields if kept in fields}
                message["content"] = _present(fields, self.content)
                found.append(Utterance(speaker=self._speaker(fields, number), message=message))
                ignored += _other_names(fields, self._message_fields | _KEPT, name)
        return found

    def _from_rows(self, record: Any, group: str, ignored: list[str]) -> tuple[list[Utterance], dict[str, Any]]:
        rows = sort_rows(rows_of(record), self.order)
        found = [
            Utterance(speaker=self._speaker(row, number), message={"content": _present(row, self.content)})
            for number, row in enumerate(rows, 1)
        ]
        extra, others = other_cells(rows, {self.order, *self._message_fields})
        ignored += others
        if self.id is None:
            extra = {"id": extra.pop(group, None), **extra}
        return found, extra

    def _from_text(self, text: Any) -> list[Utterance]:
        if not isinstance(text, str):
            raise Refused("invalid_content", f"{self.text} is {kind_of(text)}; expected a string")
        pieces = text.split(self.separator)
        if not pieces[-1].strip():
            pieces.pop()
        if pieces and not pieces[0].strip():
            pieces.pop(0)
        found = []
        for number, piece in enumerate(pieces, 1):
            name, mark, rest = piece.partition(self.speaker_separator) if self.speaker_separator else ("", "", piece)
            if self.speaker_separator and not (mark and name.strip()):
                raise Refused(
                    "missing_role",
                    f"turn {number} is {shown(piece)}; expected the speaker, then {self.speaker_separator!r}",
                )
            found.append(Utterance(speaker=name.strip() or None, message={"content": rest}))
        return found

    def _speaker(self, fields: dict[str, Any], number: int) -> str | None:
        return None if self.role is None else speaker_name(_present(fields, self.role), number)

    def _system_prompt(self, fields: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if self.system is None:
            return [], fields
        text, fields = _take_at(fields, self.system)
        if text is not None and not isinstance(text, str):
            raise Refused("invalid_field", f"{self.system} is {kind_of(text)}; expected a string")
        return ([{"role": "system", "content": text}] if text else []), fields

    def _stripped(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        return {**message, "content": content.strip()} if self.strip and isinstance(content, str) else message

    def _roles(self, speakers: Sequence[str | None]) -> list[tuple[str, list[str]]]:
        """The role name of each message; two lists under "both" if the corpus leaves open who is the assistant."""
        named = [speaker.strip() for speaker in speakers if speaker is not None]
        if len(named) < len(speakers):
            return alternating_roles(len(speakers), self.assistant)
        known = [name.lower() in self.roles or name.lower() in TOOL_CALL_ROLE_NAMES for name in named]
        if all(known) or ANYONE in self.roles:
            own = [name if knows else self.roles[ANYONE] for name, knows in zip(named, known, strict=True)]
            return [("", own)]
        calls = [name.lower() in TOOL_CALL_ROLE_NAMES and name.lower() not in self.roles for name in named]
        people = [name for name, call in zip(named, calls, strict=True) if not call]
        found = []
        for part, roles in message_roles(people, self.roles, self.assistant):
            rest = iter(roles)
            found.append((part, [name if call else next(rest) for name, call in zip(named, calls, strict=True)]))
        return found


def value_at(value: Any, path: str | None) -> Any:
    """The value at a dotted path, `_ABSENT` if there is none. A field whose name contains dots is found too.

    >>> value_at({"data": {"turns": ["Hi"]}}, "data.turns.0")
    'Hi'
    """
    if path is None:
        return _ABSENT
    if path == WHOLE:
        return value
    if isinstance(value, dict) and path in value:
        return value[path]
    for name in path.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and re.fullmatch("[0-9]{1,9}", name) and int(name) < len(value):
            value = value[int(name)]
        else:
            return _ABSENT
    return value


def values_at(value: Any, path: str) -> list[Any]:
    """The values at a dotted path, of which each step may be `EACH`.

    >>> values_at({"days": [{"chat": 1}, {"chat": 2}, {}]}, "days.*.chat")
    [1, 2]
    """
    if path in ("", WHOLE):
        return [value]
    steps = path.split(".")
    if EACH not in steps:
        found = value_at(value, path)
        return [] if found is _ABSENT else [found]
    at = steps.index(EACH)
    inside = value_at(value, ".".join(steps[:at]) or WHOLE)
    inner = [*inside.values()] if isinstance(inside, dict) else inside if isinstance(inside, list) else []
    return [found for one in inner for found in values_at(one, ".".join(steps[at + 1 :]))]


def remove_at(value: Any, path: str | None) -> dict[str, Any]:
    """A copy of a record's fields without the value at a path."""
    if not isinstance(value, dict) or path is None:
        return {}
    steps = path.split(".")
    if EACH in steps:
        before = ".".join(steps[: steps.index(EACH)])
        return remove_at(value, before) if before else {}
    if path == WHOLE or value_at(value, path) is _ABSENT:
        return dict(value)
    if path in value:
        return {name: inner for name, inner in value.items() if name != path}
    first, _, rest = path.partition(".")
    if not isinstance(value[first], dict):
        return {name: inner for name, inner in value.items() if name != first}
    return {**value, first: remove_at(value[first], rest)}


def _take_at(fields: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
    found = value_at(fields, path)
    return (None, fields) if found is _ABSENT else (found, remove_at(fields, path))


def _present(fields: Mapping[str, Any], path: str | None) -> Any:
    """The value at a path, None if there is none."""
    found = value_at(fields, path)
    return None if found is _ABSENT else found


def _required(record: Any, path: str | None) -> Any:
    found = value_at(record, path)
    if found is _ABSENT:
        has = f"has the fields {listed_names(record)}" if isinstance(record, dict) else f"is {kind_of(record)}"
        raise Refused("missing_field", f"the record {has}; expected {path}")
    return found


def _other_names(fields: Mapping[str, Any], read: Iterable[str], name: str) -> list[str]:
    taken = set(read)
    return [f"{name}.{other}" for other, value in fields.items() if other not in taken and value is not None]


def _numbers(name: str) -> list[int]:
    """The numbers in a name: sorting by them puts `turn_10` after `turn_9`."""
    return [int(digits) for digits in re.findall("[0-9]{1,18}", name)]


def _row_group(row: Any, *, column: str) -> Hashable:
    return dialogue_id(fields_of(row), column)
