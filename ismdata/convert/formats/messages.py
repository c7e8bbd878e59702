"""Lists of messages: `messages[].role/content` and every format that only names these fields differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.canonical import MOST_WEIGHT, parse_json
from ismdata.convert.columnar import flat_list, held, mask, per_record
from ismdata.convert.columnar_extras import Plain, apart, columns_of_records, ids_of, meta_of, rest_of
from ismdata.convert.corpus_format import Block, Columns, CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.content_blocks import has_blocks, spread, system_blocks, tools_of
from ismdata.convert.formats.speakers import alternating, turns
from ismdata.convert.sources.blocks import TableBlock
from ismdata.convert.training_flags import TRAINING_FLAGS
from ismdata.errors import Refused, shown

#: Message fields that keep their names in all formats, and the Arrow type that the fast road takes them as.
_OPTIONAL = {
    "train": pa.bool_(),
    "weight": pa.float64(),
    "name": pa.string(),
    "tool_call_id": pa.string(),
    "reasoning_content": pa.string(),
}
#: Message fields that the fast road accepts only as null: what they hold takes the general road.
_EMPTY = ("tool_calls", "function_call")
#: Other names for the same thing, as corpora have them.
_ALIASES = {
    "loss_weight": "weight",
    "loss_scale": "weight",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
}
#: Record fields that hold tool descriptions; the first one present is read.
_TOOLS = ("tools", "functions", "toolConfig")
#: What a record holds in a field that it does not use.
_NOTHING: tuple[Any, ...] = (None, "", [])
#: Role names of transcripts, in which "sys" gives the answers: the format `utterances`.
SIDES = frozenset({"usr", "sys"})


@dataclass(frozen=True, kw_only=True)
class MessageLists(CorpusFormat):
    """A record is an object whose field `messages` lists objects with `role` and `content`.

    Without a `role` the speakers alternate and the opener is the user. `also` holds other names of the list, under
    which the first role has to be a known one; `contents` other names of the content. `systems` are the record fields
    whose text becomes the first message, unless that says the same.
    """

    messages: str
    role: str | None
    content: str
    also: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    assistant: Side = "second"

    @property
    def expects(self) -> str:
        names = self.content if self.role is None else f"{self.role}/{self.content}"
        return f"{self.messages}[].{names}"

    def depends_on(self, choice: str) -> bool:
        return super().depends_on(choice) and (choice != "assistant" or self.role is None)

    def matches(self, record: Any) -> bool:
        if isinstance(record, dict):
            return self._name(record) is not None
        return self.role is not None and isinstance(record, list) and self._holds(record)

    def _name(self, fields: Mapping[str, Any]) -> str | None:
        """Where a record has its messages, None where it has none."""
        if self._holds(_parsed(fields.get(self.messages))):
            return self.messages
        return next((name for name in self.also if self._holds_known(_parsed(fields.get(name)))), None)

    def _holds(self, listed: Any) -> bool:
        if isinstance(listed, dict):
            return {self.role or self.content, self.content} <= listed.keys()
        first = _first(listed)
        return first is not None and (self.role or self.content) in first

    def _holds_known(self, listed: Any) -> bool:
        if isinstance(listed, dict):
            return self._holds(listed)
        first = _first(listed)
        role = first.get(self.role or "") if first is not None else None
        if first is None or not isinstance(role, str) or role.lower() not in ROLE_NAMES:
            return False
        named = any(name in first for name in (self.content, *self.contents, *_EMPTY))
        return named and not any(
            isinstance(one, dict) and isinstance(side := one.get(self.role), str) and side.lower() in SIDES
            for one in listed
        )

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = {self.messages: record} if isinstance(record, list) else dict(fields_of(record))
        name = self._name(fields) or next((name for name in (self.messages, *self.also) if name in fields), None)
        if name is None:
            raise Refused(
                "missing_field", f"the record has no {self.messages!r}; it has {', '.join(fields) or 'nothing'}"
            )
        ignored: list[str] = []
        listed = [
            one
            for number, message in enumerate(_rows(_parsed(fields.pop(name)), name), 1)
            for one in self._messages(message, number, name, ignored)
        ]
        first = self._system(fields, listed)
        tools = None
        for one in _TOOLS:
            if tools in _NOTHING:
                tools = fields.pop(one, None)
        whole = Draft(messages=first + listed, id=take_id(fields), tools=tools_of(tools), extra=fields, ignored=ignored)
        if self.role is not None:
            return [whole]
        return [
            replace(whole, messages=first + _cast(listed, roles), part=part)
            for part, roles in alternating(len(listed), self.assistant)
        ]

    def _system(self, fields: dict[str, Any], listed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Take the system prompt out of a record's fields: a message, none where the list opens with the same."""
        found: list[dict[str, Any]] = []
        for name in self.systems:
            value = system_blocks(fields.pop(name, None))
            if value is not None and not isinstance(value, str | list):
                raise Refused("invalid_field", f"{name} is {kind_of(value)}; expected a string")
            message = {"role": "system", "content": value}
            if value and listed and not (_is_system(listed[0]) and listed[0].get("content") == value):
                found += spread(message, value) if has_blocks(value) else [message]
        return found

    def _messages(self, message: Any, number: int, name: str, ignored: list[str]) -> list[dict[str, Any]]:
        """A message under our names for its fields, several where tools' results are blocks of it.

        What has no place goes to `ignored`.
        """
        if not isinstance(message, dict):
            raise Refused("not_an_object", f"message {number} is {kind_of(message)}; expected an object")
        draft: dict[str, Any] = {}
        content = self._content_name(message)
        for field, value in message.items():
            target = "content" if field == content else self._target(field)
            if target is not None and draft.get(target) is None:
                draft[target] = value
            elif value is not None:
                ignored.append(f"{name}[].{field}")
        found = draft.get("content")
        return spread(draft, found) if isinstance(found, list) and has_blocks(found) else [draft]

    def _content_name(self, message: Mapping[str, Any]) -> str:
        """Where a message has its content: the first name under which there is some."""
        if not self.contents or message.get(self.content):
            return self.content
        present = [name for name in (self.content, *self.contents) if message.get(name) is not None]
        return next((name for name in present if message[name]), present[0] if present else self.content)

    def _target(self, name: str) -> str | None:
        if name == self.role:
            return "role"
        if name in _OPTIONAL or name in _EMPTY or name in TRAINING_FLAGS:
            return name
        return _ALIASES.get(name)

    def plain(self, record: Any) -> Plain | None:
        """A record of plain texts for the fast road, None for any other: it must be read here as `drafts` reads it."""
        if not isinstance(record, dict) or self.role is None:
            return None
        name = self._name(record)
        listed = record.get(name) if name is not None else None
        if not listed or not isinstance(listed, list):
            return None
        roles: list[str] = []
        contents: list[str] = []
        ignored: list[str] = []
        for message in listed:
            if type(message) is not dict:
                return None
            role, content = message.get(self.role), message.get(self.content)
            if type(role) is not str or type(content) is not str or not content:
                return None
            roles.append(role)
            contents.append(content)
            if len(message) > 2:
                for field, value in message.items():
                    if value is None or field == self.content or field == self.role:
                        continue
                    if self._target(field) is not None:
                        return None
                    ignored.append(f"{name}[].{field}")
        rest = rest_of({one: value for one, value in record.items() if one != name}, (*self.systems, *_TOOLS))
        return None if rest is None else Plain(roles=roles, contents=contents, rest=rest, ignored=ignored)

    def schema(self) -> pa.Schema:
        """What the fast road reads at once; blocks that hold anything else are read by `plain`."""
        message = {self.content: pa.string(), **_OPTIONAL, **dict.fromkeys(_EMPTY, pa.null())}
        if self.role is not None:
            message[self.role] = pa.string()
        record = {"id": pa.string(), self.messages: pa.list_(pa.struct(list(message.items()))), "tools": pa.string()}
        record |= dict.fromkeys(self.systems, pa.string())
        return pa.schema(list(record.items()))

    def parse_block(self, block: Block) -> Columns | None:
        both = self.role is None and self.assistant == "both"
        table = None if both else block.table(self.schema())
        if table is not None:
            return self._columns_of(table)
        if self.role is None:
            return None
        found = self._columns_apart(block) if isinstance(block, TableBlock) else None
        return columns_of_records(block, self.plain) if found is None else found

    def _columns_apart(self, block: TableBlock) -> Columns | None:
        """The columns of a table that holds more than messages, None where they are not plain lists."""
        names = [name for name in (self.messages, *self.also) if name in block.rows.column_names]
        heeded = {*_ALIASES, *self.contents, *(TRAINING_FLAGS - {"train"})}
        parts = apart(block, names[0], known=self._known, heeded=heeded) if len(names) == 1 else None
        if parts is None:
            return None
        messages = TableBlock(rows=parts.messages.rows.rename_columns([self.messages]), numbers=block.numbers)
        table = messages.table(self.schema())
        if table is None:
            return None
        columns = self._columns_of(table)
        rests = [rest_of(fields, (*self.systems, *_TOOLS)) for fields in parts.others]
        care = columns.care | parts.care | np.array([rest is None for rest in rests], np.bool_)
        return replace(columns, ids=ids_of(rests), meta=meta_of(rests), ignored=parts.ignored, care=care)

    @property
    def _known(self) -> set[str]:
        """The message fields that the fast road reads at once."""
        return {self.role or self.content, self.content, *_OPTIONAL, *_EMPTY}

    def _columns_of(self, table: pa.Table) -> Columns:
        offsets, messages = flat_list(table[self.messages])
        contents = messages.field(self.content)
        roles = turns(offsets, self.assistant) if self.role is None else messages.field(self.role)
        weight = messages.field("weight")
        optional = {name: messages.field(name) for name in _OPTIONAL}
        # A null message, role or content, and weights out of range: the general road has the words for them.
        odd = mask(messages.is_null()) | mask(roles.is_null()) | mask(contents.is_null())
        if weight.null_count < len(weight):
            # NaN is in no range.
            sound = pc.and_(pc.greater_equal(weight, 0.0), pc.less_equal(weight, MOST_WEIGHT))
            odd |= ~mask(pc.fill_null(sound, True))
        care = (np.diff(offsets) == 0) | per_record(odd, offsets)
        for name in ("tools", *self.systems):
            care |= held(table[name])
        return Columns(
            ids=table["id"].combine_chunks(),
            offsets=offsets,
            roles=roles,
            contents=contents,
            optional=optional,
            care=care,
        )


def _is_system(message: Mapping[str, Any]) -> bool:
    role = message.get("role")
    return isinstance(role, str) and ROLE_NAMES.get(role.lower()) == "system"


def _first(listed: Any) -> dict[str, Any] | None:
    """The first message of a list."""
    return next((one for one in listed if isinstance(one, dict)), None) if isinstance(listed, list) else None


def _parsed(value: Any) -> Any:
    """A list of messages; tables of text hold it as the JSON text of one."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _cast(listed: list[dict[str, Any]], roles: list[str]) -> list[dict[str, Any]]:
    return [{**message, "role": role} for message, role in zip(listed, roles, strict=True)]


def _rows(value: Any, name: str) -> list[Any]:
    """The list of messages; an object of equally long lists, as some Parquet files hold it, is turned round."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise Refused(
                "invalid_field", f"the lists in {name!r} differ in length; expected one entry a message in each"
            )
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if value is None:
        return []
    if not isinstance(value, list):
        found = f"{name!r} is {kind_of(value)}" if not isinstance(value, str) else f"{name!r} is {shown(value)}"
        raise Refused("invalid_field", f"{found}; expected a list of messages")
    return value


#: The formats of this family.
OPENAI = MessageLists(
    messages="messages",
    role="role",
    content="content",
    also=("conversations", "conversation"),
    contents=("text", "value", "refusal"),
    systems=("system", "system_prompt"),
)
SHAREGPT = MessageLists(
    messages="conversations",
    role="from",
    content="value",
    also=("items", "conversation", "messages"),
    contents=("text", "markdown", "content"),
    systems=("system", "system_prompt"),
)
GEMINI = MessageLists(
    messages="contents", role="role", content="parts", systems=("systemInstruction", "system_instruction")
)
CLAUDE_EXPORT = MessageLists(messages="chat_messages", role="sender", content="content", contents=("text",))
KDCONV = MessageLists(messages="messages", role=None, content="message")
