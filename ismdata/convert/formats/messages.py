"""Lists of messages: `messages[].role/content`, and every format that differs from it only in field names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.choices import Side
from ismdata.conversation import ROLE_NAMES
from ismdata.convert.answer_labels import labels_message_as_bad, may_label_message
from ismdata.convert.canonical import MAX_WEIGHT
from ismdata.convert.columnar import any_per_record, as_bools, flat_list, has_text
from ismdata.convert.columnar_extras import (
    PlainRecord,
    columns_of_records,
    id_column,
    meta_column,
    record_info,
    split_table,
)
from ismdata.convert.corpus_format import Block, Columns, CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.content_blocks import has_blocks, openai_tools, split_blocks, system_blocks
from ismdata.convert.formats.fields import (
    BRANCHES,
    FILES,
    is_columns,
    missing_field,
    refuse_files,
    rows_of_columns,
    take_instruction,
    take_more_systems,
)
from ismdata.convert.formats.speakers import alternating_role_column, alternating_roles, with_roles
from ismdata.convert.formats.threads import check_one_path, is_place
from ismdata.convert.json_values import parse_record_json
from ismdata.convert.sources.blocks import TableBlock
from ismdata.convert.training_flags import TRAINING_FLAGS
from ismdata.errors import Refused, shown

#: Message fields that keep their names in all formats, and their Arrow types on the fast path.
_OPTIONAL = {
    "train": pa.bool_(),
    "weight": pa.float64(),
    "name": pa.string(),
    "tool_call_id": pa.string(),
    "reasoning_content": pa.string(),
}
#: Message fields that must be null on the fast path; records with values in them take the general path.
_EMPTY = ("tool_calls", "function_call")
#: Other names of message fields.
_ALIASES = {
    "loss_weight": "weight",
    "loss_scale": "weight",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
}
#: Record fields with tool descriptions; the first one present is read.
_TOOLS = ("tools", "functions", "toolConfig")
#: Values of unused record fields.
_NOTHING: tuple[Any, ...] = (None, "", [])
#: Role names of transcripts in which "sys" gives the answers: the format `utterances`.
SIDES = frozenset({"usr", "sys"})


@dataclass(frozen=True, kw_only=True)
class MessageLists(CorpusFormat):
    """A record is an object whose field `messages` lists objects with `role` and `content`.

    Attributes:
        messages: The field with the list.
        role: The field with a message's role. None: the speakers alternate, and the first one is the user.
        content: The field with a message's content.
        also: Other names of the list; under them, the first role must be a known one.
        contents: Other names of the content.
        systems: Record fields whose text becomes the first message, unless the list begins with the same text.
        assistant: Which speaker is the assistant, if `role` is None.
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
            return self._list_field(record) is not None
        return self.role is not None and isinstance(record, list) and self._is_messages(record)

    def _list_field(self, fields: Mapping[str, Any]) -> str | None:
        """The field in which a record has its messages, None if it has none."""
        if self._is_messages(_parsed(fields.get(self.messages))):
            return self.messages
        return next((name for name in self.also if self._has_known_role(_parsed(fields.get(name)))), None)

    def _is_messages(self, listed: Any) -> bool:
        if isinstance(listed, dict):
            return {self.role or self.content, self.content} <= listed.keys()
        first = _first_message(listed)
        return first is not None and (self.role or self.content) in first

    def _has_known_role(self, listed: Any) -> bool:
        """Whether a value is a list of messages of which the first has a known role, and none is of a transcript."""
        if isinstance(listed, dict):
            return self._is_messages(listed)
        first = _first_message(listed)
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
        name = self._list_field(fields) or next((name for name in (self.messages, *self.also) if name in fields), None)
        if name is None:
            raise missing_field(fields, repr(self.messages))
        ignored: list[str] = []
        listed = _message_list(_parsed(fields.pop(name)), name)
        check_one_path(listed)
        messages = [
            one for number, message in enumerate(listed, 1) for one in self._converted(message, number, name, ignored)
        ]
        system = self._take_system(fields, messages)
        tools = None
        for one in _TOOLS:
            if tools in _NOTHING:
                tools = fields.pop(one, None)
        whole = Draft(
            messages=system + messages, id=take_id(fields), tools=openai_tools(tools), extra=fields, ignored=ignored
        )
        if self.role is not None:
            return [whole]
        return [
            replace(whole, messages=system + with_roles(messages, roles), id_suffix=part)
            for part, roles in alternating_roles(len(messages), self.assistant)
        ]

    def _take_system(self, fields: dict[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Remove the system prompt from a record's fields. Returns its messages; none if the list begins with it."""
        found: list[dict[str, Any]] = []
        for name in self.systems:
            value = system_blocks(fields.pop(name, None))
            if value is not None and not isinstance(value, str | list):
                raise Refused("invalid_field", f"{name} is {kind_of(value)}; expected a string")
            message = {"role": "system", "content": value}
            if value and messages and not (_is_system(messages[0]) and messages[0].get("content") == value):
                found += split_blocks(message, value) if has_blocks(value) else [message]
        if not messages:
            return found
        first = [messages[0].get("content")] if _is_system(messages[0]) else []
        known = [*first, *(message["content"] for message in found)]
        texts = take_more_systems(fields, known)
        if not known and not texts:
            texts = take_instruction(fields, [message.get("content") for message in messages])
        return found + [{"role": "system", "content": text} for text in texts]

    def _converted(self, message: Any, number: int, name: str, ignored: list[str]) -> list[dict[str, Any]]:
        """A message under canonical field names; several messages if it has blocks with tool results.

        Adds the names of fields that are left out to `ignored`.
        """
        if not isinstance(message, dict):
            raise Refused("not_an_object", f"message {number} is {kind_of(message)}; expected an object")
        refuse_files(message, number)
        draft: dict[str, Any] = {}
        content = self._content_field(message)
        for field, value in message.items():
            target = "content" if field == content else self._canonical_name(field)
            if target is not None and draft.get(target) is None:
                draft[target] = value
            elif value is not None:
                ignored.append(f"{name}[].{field}")
                if labels_message_as_bad(field, value):
                    draft["is_bad"] = True
        found = draft.get("content")
        return split_blocks(draft, found) if isinstance(found, list) and has_blocks(found) else [draft]

    def _content_field(self, message: Mapping[str, Any]) -> str:
        """The field of a message's content: the first name under which there is some."""
        if not self.contents or message.get(self.content):
            return self.content
        present = [name for name in (self.content, *self.contents) if message.get(name) is not None]
        return next((name for name in present if message[name]), present[0] if present else self.content)

    def _canonical_name(self, name: str) -> str | None:
        if name == self.role:
            return "role"
        if name in _OPTIONAL or name in _EMPTY or name in TRAINING_FLAGS:
            return name
        return _ALIASES.get(name)

    def parse_plain(self, record: Any) -> PlainRecord | None:
        """A record of plain texts, for the fast path; None for any other. Must read it as `parse_record` does."""
        if not isinstance(record, dict) or self.role is None:
            return None
        name = self._list_field(record)
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
                    if self._canonical_name(field) is not None or _needs_general_path(field):
                        return None
                    ignored.append(f"{name}[].{field}")
        info = record_info({one: value for one, value in record.items() if one != name}, (*self.systems, *_TOOLS))
        return None if info is None else PlainRecord(roles=roles, contents=contents, info=info, ignored=ignored)

    def schema(self) -> pa.Schema:
        """The columns that the fast path reads at once. Blocks with anything else are read by `parse_plain`."""
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
        found = self._columns_of_wide_table(block) if isinstance(block, TableBlock) else None
        return columns_of_records(block, self.parse_plain) if found is None else found

    def _columns_of_wide_table(self, block: TableBlock) -> Columns | None:
        """The columns of a table with columns beside its messages; None if the messages are no plain lists."""
        names = [name for name in (self.messages, *self.also) if name in block.rows.column_names]
        significant = {
            *_ALIASES,
            *self.contents,
            *FILES,
            *BRANCHES,
            *(TRAINING_FLAGS - {"train"}),
            *_places(block, names),
        }
        parts = (
            split_table(block, names[0], known=self._fast_fields, significant=significant) if len(names) == 1 else None
        )
        if parts is None:
            return None
        messages = TableBlock(rows=parts.messages.rows.rename_columns([self.messages]), numbers=block.numbers)
        table = messages.table(self.schema())
        if table is None:
            return None
        columns = self._columns_of(table)
        infos = [record_info(fields, (*self.systems, *_TOOLS)) for fields in parts.others]
        fallback = columns.fallback | parts.fallback | np.array([info is None for info in infos], np.bool_)
        return replace(columns, ids=id_column(infos), meta=meta_column(infos), ignored=parts.ignored, fallback=fallback)

    @property
    def _fast_fields(self) -> set[str]:
        """The message fields that the fast path reads."""
        return {self.role or self.content, self.content, *_OPTIONAL, *_EMPTY}

    def _columns_of(self, table: pa.Table) -> Columns:
        offsets, messages = flat_list(table[self.messages])
        contents = messages.field(self.content)
        roles = alternating_role_column(offsets, self.assistant) if self.role is None else messages.field(self.role)
        weight = messages.field("weight")
        optional = {name: messages.field(name) for name in _OPTIONAL}
        # The general path refuses null messages, roles and contents, and weights out of range.
        odd = as_bools(messages.is_null()) | as_bools(roles.is_null()) | as_bools(contents.is_null())
        if weight.null_count < len(weight):
            # False for NaN.
            in_range = pc.and_(pc.greater_equal(weight, 0.0), pc.less_equal(weight, MAX_WEIGHT))
            odd |= ~as_bools(pc.fill_null(in_range, True))
        fallback = (np.diff(offsets) == 0) | any_per_record(odd, offsets)
        for name in ("tools", *self.systems):
            fallback |= has_text(table[name])
        return Columns(
            ids=table["id"].combine_chunks(),
            offsets=offsets,
            roles=roles,
            contents=contents,
            optional=optional,
            fallback=fallback,
        )


@lru_cache(maxsize=4096)
def _needs_general_path(field: str) -> bool:
    """Whether a message field decides how a list is read, although messages do not keep it."""
    return field in FILES or field in BRANCHES or is_place(field) or may_label_message(field)


def _places(block: TableBlock, names: Sequence[str]) -> list[str]:
    """The fields of messages in these columns of a table that can label them or say to which thread they belong."""
    kinds = [getattr(block.rows.schema.field(name).type, "value_type", None) for name in names]
    return [
        field.name
        for kind in kinds
        if kind is not None and pa.types.is_struct(kind)
        for field in kind
        if is_place(field.name) or may_label_message(field.name)
    ]


def _is_system(message: Mapping[str, Any]) -> bool:
    role = message.get("role")
    return isinstance(role, str) and ROLE_NAMES.get(role.lower()) == "system"


def _first_message(listed: Any) -> dict[str, Any] | None:
    return next((one for one in listed if isinstance(one, dict)), None) if isinstance(listed, list) else None


def _parsed(value: Any) -> Any:
    """A list of messages given as JSON text, as CSV files have it, parsed; anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return parse_record_json(value)
        except ValueError:
            return value
    return value


def _message_list(value: Any, name: str) -> list[Any]:
    """The list of messages in the field `name`. Raises Refused."""
    if is_columns(value):
        return rows_of_columns(value, repr(name))
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
    contents=("text", "value", "message", "refusal"),
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
