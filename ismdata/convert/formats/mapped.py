"""A corpus of any shape, read as a mapping file says: `convert/mapping_file.py` reads that file."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ismdata.choices import Side
from ismdata.conversation import MESSAGE_TYPE, TOOL_CALL_ROLE_NAMES
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of, take_id
from ismdata.convert.formats.dialogue_rows import cell_id, group_of, shared, speaker_of
from ismdata.convert.formats.speakers import alternating, played
from ismdata.convert.sources.grouping import by_key, in_order
from ismdata.convert.training_flags import TRAINING_FLAGS
from ismdata.errors import Refused, shown

#: The path of a record itself.
WHOLE = "."
#: In the roles: whoever has no role by name.
ANYONE = "*"

#: Message fields that keep their names, where messages are objects.
_KEPT = frozenset({field.name for field in MESSAGE_TYPE} | {"function_call"} | TRAINING_FLAGS) - {"role", "content"}
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Said:
    """One message before its role is known: `speaker` is None where speakers only alternate."""

    speaker: str | None
    message: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Mapped(CorpusFormat):
    """Exactly one of `messages`, `text` and `group` is set: a list, one string, or rows. Paths are dotted.

    `roles` maps role names in lower case to canonical roles; `ANYONE` among them stands for all other names.
    """

    messages: str | None = None
    role: str | None = None
    content: str | None = None
    exchange: tuple[str, ...] = ()
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
            return f"{self.text}, turns set apart by {self.separator!r}"
        inner = "/".join(self.exchange) or "/".join(name for name in (self.role, self.content) if name) or "text"
        return f"{self.messages}[].{inner}"

    @property
    def plain_text(self) -> bool:
        return self.text == WHOLE

    def matches(self, record: Any) -> bool:
        if self.group is not None:
            return isinstance(record, dict) and self.group in record and at(record, self.content) is not _ABSENT
        if self.text is not None:
            return isinstance(at(record, self.text), str)
        try:
            listed = self._elements(at(record, self.messages))
        except Refused:
            return False
        first = next((element for element in listed if element is not None), None)
        if self.exchange:
            return all(at(first, name) is not _ABSENT for name in self.exchange)
        return isinstance(first, str) if self.content is None else at(first, self.content) is not _ABSENT

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        if self.group is None:
            yield from blocks
        else:
            yield from by_key(blocks, partial(_row_group, column=self.group))

    def said(self, record: Any) -> list[Said]:
        """The messages of a record before they have roles. Raises Refused."""
        return self._apart(record, [])[0]

    def _apart(self, record: Any, ignored: list[str]) -> tuple[list[Said], dict[str, Any]]:
        """The messages of a record and its other fields; names of fields that are left out go to `ignored`."""
        if self.group is not None:
            return self._of_rows(record, self.group, ignored)
        if self.text is not None:
            return self._of_text(_required(record, self.text)), without(record, self.text)
        listed = _required(record, self.messages)
        said = self._of_elements(self._elements(listed), f"{self.messages}[]", ignored)
        fields = without(record, self.messages)
        if listed is record:  # one exchange: the other fields of the record say something of all of it
            fields = {name: value for name, value in fields.items() if name not in self._inside}
        return said, fields

    def parse_record(self, record: Any) -> Sequence[Draft]:
        ignored: list[str] = []
        said, fields = self._apart(record, ignored)
        first, fields = self._system(fields)
        tools, fields = _taken(fields, self.tools or "tools")
        own, fields = (take_id(fields), fields) if self.id is None else _taken(fields, self.id)
        whole = Draft(
            messages=(), id=own if self.id is None else cell_id(own), tools=tools, extra=fields, ignored=ignored
        )
        messages = [self._stripped(one.message) for one in said]
        return [
            replace(
                whole,
                messages=first + [{**message, "role": role} for message, role in zip(messages, roles, strict=True)],
                part=part,
            )
            for part, roles in self._roles([one.speaker for one in said])
        ]

    @property
    def _inside(self) -> set[str]:
        """The fields of a message that are read."""
        return {name.split(".")[0] for name in (*self.exchange, self.role, self.content) if name}

    def _elements(self, value: Any) -> Sequence[Any]:
        """The messages or exchanges: of a list, of an object that is one, or of an object's values."""
        if value is None or isinstance(value, list):
            return value or []
        if not isinstance(value, dict):
            raise Refused("invalid_field", f"{self.messages} is {kind_of(value)}; expected a list or an object")
        if self._inside and self._inside <= value.keys():
            columns = list(value.values())
            if not all(isinstance(column, list) for column in columns):
                return [value]
            if len({len(column) for column in columns}) > 1:
                raise Refused(
                    "invalid_field", f"the lists in {self.messages} differ in length; expected one entry each"
                )
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        return [value[name] for name in sorted(value, key=_numbers)] if all(map(_numbers, value)) else [*value.values()]

    def _of_elements(self, listed: Sequence[Any], name: str, ignored: list[str]) -> list[Said]:
        said: list[Said] = []
        for number, element in enumerate(listed, 1):
            if self.exchange:
                texts = {field: at(element, field) for field in self.exchange}
                given = {field: text for field, text in texts.items() if text is not _ABSENT and text is not None}
                if not given:
                    raise Refused(
                        "missing_field", f"{name} {number} is {shown(element)}; expected {', '.join(self.exchange)}"
                    )
                said += [Said(speaker=field, message={"content": text}) for field, text in given.items()]
                if isinstance(element, dict) and name != f"{WHOLE}[]":
                    ignored += _others(element, self._inside, name)
            elif self.content is None:
                if not isinstance(element, str):
                    raise Refused("invalid_content", f"message {number} is {kind_of(element)}; expected a string")
                said.append(Said(speaker=None, message={"content": element}))
            else:
                fields = fields_of(element)
                message = {kept: fields[kept] for kept in _KEPT - self._inside if kept in fields}
                content = at(fields, self.content)
                message["content"] = None if content is _ABSENT else content
                said.append(Said(speaker=self._speaker(fields, number), message=message))
                ignored += _others(fields, self._inside | _KEPT, name)
        return said

    def _of_rows(self, record: Any, group: str, ignored: list[str]) -> tuple[list[Said], dict[str, Any]]:
        rows = in_order([fields_of(row) for row in (record if isinstance(record, list) else [record])], self.order)
        if not rows:
            raise Refused("no_messages", "the dialogue has no rows")
        said = []
        for number, row in enumerate(rows, 1):
            text = at(row, self.content)
            content = None if text is _ABSENT else text
            said.append(Said(speaker=self._speaker(row, number), message={"content": content}))
        extra, others = shared(rows, {self.order, *self._inside})
        ignored += others
        if self.id is None:
            extra = {"id": extra.pop(group, None), **extra}
        return said, extra

    def _of_text(self, text: Any) -> list[Said]:
        if not isinstance(text, str):
            raise Refused("invalid_content", f"{self.text} is {kind_of(text)}; expected a string")
        pieces = text.split(self.separator)
        if not pieces[-1].strip():
            pieces.pop()
        if pieces and not pieces[0].strip():
            pieces.pop(0)
        said = []
        for number, piece in enumerate(pieces, 1):
            name, found, rest = piece.partition(self.speaker_separator) if self.speaker_separator else ("", "", piece)
            if self.speaker_separator and not (found and name.strip()):
                raise Refused(
                    "missing_role",
                    f"turn {number} is {shown(piece)}; expected who speaks, then {self.speaker_separator!r}",
                )
            said.append(Said(speaker=name.strip() or None, message={"content": rest}))
        return said

    def _speaker(self, fields: dict[str, Any], number: int) -> str | None:
        if self.role is None:
            return None
        value = at(fields, self.role)
        return speaker_of(None if value is _ABSENT else value, number)

    def _system(self, fields: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if self.system is None:
            return [], fields
        text, fields = _taken(fields, self.system)
        if text is not None and not isinstance(text, str):
            raise Refused("invalid_field", f"{self.system} is {kind_of(text)}; expected a string")
        return ([{"role": "system", "content": text}] if text else []), fields

    def _stripped(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        return {**message, "content": content.strip()} if self.strip and isinstance(content, str) else message

    def _roles(self, speakers: Sequence[str | None]) -> list[tuple[str, list[str]]]:
        """The role name of each message; two lists under "both", where the data leave open who is who."""
        named = [speaker.strip() for speaker in speakers if speaker is not None]
        if len(named) < len(speakers):
            return alternating(len(speakers), self.assistant)
        known = [name.lower() in self.roles or name.lower() in TOOL_CALL_ROLE_NAMES for name in named]
        if all(known) or ANYONE in self.roles:
            own = [name if knows else self.roles[ANYONE] for name, knows in zip(named, known, strict=True)]
            return [("", own)]
        calls = [name.lower() in TOOL_CALL_ROLE_NAMES and name.lower() not in self.roles for name in named]
        people = [name for name, call in zip(named, calls, strict=True) if not call]
        found = []
        for part, roles in played(people, self.roles, self.assistant):
            rest = iter(roles)
            found.append((part, [name if call else next(rest) for name, call in zip(named, calls, strict=True)]))
        return found


def at(value: Any, path: str | None) -> Any:
    """What lies at a dotted path, `_ABSENT` when nothing does. A field whose name has dots in it is found as well.

    >>> at({"data": {"turns": ["Hi"]}}, "data.turns.0")
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


def without(value: Any, path: str | None) -> dict[str, Any]:
    """A copy of the fields of a record, without what lies at a path."""
    if not isinstance(value, dict) or path is None:
        return {}
    if path == WHOLE or at(value, path) is _ABSENT:
        return dict(value)
    if path in value:
        return {name: inner for name, inner in value.items() if name != path}
    first, _, rest = path.partition(".")
    if not isinstance(value[first], dict):
        return {name: inner for name, inner in value.items() if name != first}
    return {**value, first: without(value[first], rest)}


def _taken(fields: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
    found = at(fields, path)
    return (None, fields) if found is _ABSENT else (found, without(fields, path))


def _required(record: Any, path: str | None) -> Any:
    found = at(record, path)
    if found is _ABSENT:
        has = ", ".join(map(str, record)) if isinstance(record, dict) else kind_of(record)
        raise Refused("missing_field", f"the record has no {path}; it has {has or 'nothing'}")
    return found


def _others(fields: Mapping[str, Any], read: Iterable[str], name: str) -> list[str]:
    taken = set(read)
    return [f"{name}.{other}" for other, value in fields.items() if other not in taken and value is not None]


def _numbers(name: str) -> list[int]:
    """The numbers in a name, for `turn_10` to follow `turn_9`."""
    return [int(digits) for digits in re.findall("[0-9]{1,18}", name)]


def _row_group(row: Any, *, column: str) -> Hashable:
    return group_of(fields_of(row), column)
