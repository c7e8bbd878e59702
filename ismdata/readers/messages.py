"""Lists of messages: `messages[].role/content` and every format that only names these fields differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.readers.base import Block, Columns, Draft, Reader, Refused, Side, fields_of, kind_of, take_id
from ismdata.readers.canonical import MOST_WEIGHT
from ismdata.readers.columnar import flat_list, held, mask, per_record
from ismdata.readers.speakers import alternating, turns

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
_ALIASES = {"loss_weight": "weight", "reasoning": "reasoning_content"}


@dataclass(frozen=True, kw_only=True)
class MessageLists(Reader):
    """A record is an object whose field `messages` lists objects with `role` and `content`.

    Without a `role` the speakers alternate and the opener is the user. `system` names a record field whose text becomes
    the first message.
    """

    messages: str
    role: str | None
    content: str
    system: str | None = None
    assistant: Side = "second"

    @property
    def expects(self) -> str:
        names = self.content if self.role is None else f"{self.role}/{self.content}"
        return f"{self.messages}[].{names}"

    def heeds(self, choice: str) -> bool:
        return super().heeds(choice) and (choice != "assistant" or self.role is None)

    def fits(self, record: Any) -> bool:
        listed = record.get(self.messages) if isinstance(record, dict) else record
        if isinstance(listed, dict):
            return {self.role or self.content, self.content} <= listed.keys()
        if not isinstance(listed, list) or (isinstance(record, list) and self.role is None):
            return False
        first = next((message for message in listed if isinstance(message, dict)), None)
        return first is not None and (self.role or self.content) in first

    def drafts(self, record: Any) -> Sequence[Draft]:
        fields = {self.messages: record} if isinstance(record, list) else dict(fields_of(record))
        if self.messages not in fields:
            raise Refused(
                "missing_field", f"the record has no {self.messages!r}; it has {', '.join(fields) or 'nothing'}"
            )
        ignored: list[str] = []
        listed = [
            self._message(message, number, ignored)
            for number, message in enumerate(_rows(fields.pop(self.messages), self.messages), 1)
        ]
        system = fields.pop(self.system, None) if self.system else None
        if system is not None and not isinstance(system, str):
            raise Refused("invalid_field", f"{self.system} is {kind_of(system)}; expected a string")
        first = [{"role": "system", "content": system}] if system and listed else []
        tools = fields.pop("tools", None)
        functions = fields.pop("functions", None)
        whole = Draft(
            messages=first + listed,
            id=take_id(fields),
            tools=functions if tools is None else tools,
            extra=fields,
            ignored=ignored,
        )
        if self.role is not None:
            return [whole]
        return [
            replace(whole, messages=first + _cast(listed, roles), part=part)
            for part, roles in alternating(len(listed), self.assistant)
        ]

    def _message(self, message: Any, number: int, ignored: list[str]) -> dict[str, Any]:
        """A message under our names for its fields; what has no place goes to `ignored`."""
        if not isinstance(message, dict):
            raise Refused("not_an_object", f"message {number} is {kind_of(message)}; expected an object")
        draft: dict[str, Any] = {}
        for name, value in message.items():
            target = self._target(name)
            if target is not None and draft.get(target) is None:
                draft[target] = value
            elif value is not None:
                ignored.append(f"{self.messages}[].{name}")
        return draft

    def _target(self, name: str) -> str | None:
        if name == self.role:
            return "role"
        if name == self.content:
            return "content"
        if name in _OPTIONAL or name in _EMPTY:
            return name
        return _ALIASES.get(name)

    def schema(self) -> pa.Schema:
        """What the fast road reads; a block that holds anything else is declined."""
        message = {self.content: pa.string(), **_OPTIONAL, **dict.fromkeys(_EMPTY, pa.null())}
        if self.role is not None:
            message[self.role] = pa.string()
        record = {"id": pa.string(), self.messages: pa.list_(pa.struct(list(message.items()))), "tools": pa.string()}
        if self.system is not None:
            record[self.system] = pa.string()
        return pa.schema(list(record.items()))

    def columns(self, block: Block) -> Columns | None:
        both = self.role is None and self.assistant == "both"
        table = None if both else block.table(self.schema())
        if table is None:
            return None
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
        for name in ("tools", self.system):
            if name is not None:
                care |= held(table[name])
        return Columns(
            ids=table["id"].combine_chunks(),
            offsets=offsets,
            roles=roles,
            contents=contents,
            optional=optional,
            care=care,
        )


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
        raise Refused("invalid_field", f"{name!r} is {kind_of(value)}; expected a list of messages")
    return value


#: The formats of this family.
OPENAI = MessageLists(messages="messages", role="role", content="content")
SHAREGPT = MessageLists(messages="conversations", role="from", content="value", system="system")
KDCONV = MessageLists(messages="messages", role=None, content="message")
