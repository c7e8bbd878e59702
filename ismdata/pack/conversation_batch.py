"""Converted conversations as columns: what the tokenizing road reads of a record batch.

Shape legend: C conversations, M messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.conversation import ASSISTANT, ROLES, SYSTEM
from ismdata.rendering.chat_template import CannotRender, Message
from ismdata.rendering.sensitivity import Sensitivity
from ismdata.rendering.tracing import REASONING_END

IntArray = NDArray[np.int64]


class InvalidArguments(CannotRender):
    """The arguments of a tool call are not JSON."""

    reason = "invalid_arguments"


#: Fields of a message that only a rendering of the conversation by itself takes into account.
_SPECIAL_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True, kw_only=True)
class ConversationBatch:
    """Converted conversations as columns."""

    rows: pa.RecordBatch
    contents: pa.LargeStringArray  # [M], null as empty
    roles: NDArray[np.uint8]  # [M], codes of conversation.ROLES
    first: IntArray  # [C + 1], where each conversation's messages begin
    trained: NDArray[np.bool_]  # [M], assistant messages that are to be trained
    weight: NDArray[np.float32] | None  # [M], 1 where a message has none; None where no message has one
    by_itself: NDArray[np.bool_]  # [C], conversations that only the template itself can render

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def heads(self) -> IntArray:
        """How many system messages each conversation begins with, int64[C]."""
        other = np.append(np.flatnonzero(self.roles != SYSTEM), len(self.roles))
        heads: IntArray = np.minimum(other[np.searchsorted(other, self.first[:-1])], self.first[1:]) - self.first[:-1]
        return heads

    def conversation(self, c: int) -> dict[str, Any]:
        """Conversation c as JSON has it, without its null fields."""
        row = self.rows.slice(c, 1).to_pylist()[0]
        row["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
        return {key: value for key, value in row.items() if value is not None}


#: What of the answers that a conversation's flags leave is trained: all of them, the last one, or all without their
#: reasoning.
TrainOn = Literal["all", "last", "content"]
TRAIN_ON: tuple[TrainOn, ...] = ("all", "last", "content")


def conversation_batch(rows: pa.RecordBatch, sensitive: Sensitivity, train_on: TrainOn = "all") -> ConversationBatch:
    """Columns of converted rows. `sensitive` says which contents the template does more with than write them."""
    messages = rows.column("messages")
    first = messages.offsets.to_numpy().astype(np.int64)
    fields = messages.flatten()
    first = first - first[0]
    contents = pc.fill_null(fields.field("content"), "").cast(pa.large_string())
    codes = pc.index_in(fields.field("role"), value_set=pa.array(ROLES)).to_numpy(zero_copy_only=False)
    roles = codes.astype(np.uint8)

    special = np.zeros(len(roles), bool)
    for name in _SPECIAL_FIELDS:
        if fields.field(name).null_count < len(fields):
            special |= fields.field(name).is_valid().to_numpy(zero_copy_only=False)
    if sensitive.blank:
        special |= pc.equal(pc.utf8_trim_whitespace(contents), "").to_numpy(zero_copy_only=False)
    for trigger in sensitive.triggers:
        special |= pc.match_substring(contents, trigger).to_numpy(zero_copy_only=False)
    if train_on == "content":  # where reasoning ends, only a rendering of the conversation by itself says
        special |= pc.match_substring_regex(contents, REASONING_END).to_numpy(zero_copy_only=False)
    counted = np.concatenate([[0], np.cumsum(special)])
    by_itself = counted[first[1:]] > counted[first[:-1]]
    by_itself |= sensitive.everything
    by_itself |= rows.column("tools").is_valid().to_numpy(zero_copy_only=False)

    train = pc.fill_null(fields.field("train"), True).to_numpy(zero_copy_only=False)
    trained = (roles == ASSISTANT) & train
    weight = None
    if fields.field("weight").null_count < len(fields):
        weight = pc.fill_null(fields.field("weight"), 1.0).to_numpy(zero_copy_only=False).astype(np.float32)
        trained &= weight != 0
    if train_on == "last":
        answers = np.flatnonzero(trained)
        owner = np.searchsorted(first, answers, side="right")
        trained = np.zeros(len(roles), bool)
        trained[answers[np.append(owner[1:] != owner[:-1], True)] if len(answers) else answers] = True
    return ConversationBatch(
        rows=rows, contents=contents, roles=roles, first=first, trained=trained, weight=weight, by_itself=by_itself
    )


def as_template_messages(conversation: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """A canonical conversation as templates take it: tool calls and tools parsed, training marks left out.

    Raises InvalidArguments.
    """
    messages = []
    for number, message in enumerate(conversation["messages"], 1):
        shaped = {key: message[key] for key in ("role", "content", *_SPECIAL_FIELDS) if message.get(key) is not None}
        if "tool_calls" in shaped:
            shaped["tool_calls"] = json.loads(shaped["tool_calls"])
            for call in shaped["tool_calls"]:
                _parse_arguments(call, number)
        shaped.setdefault("content", None)  # templates ask `content is none`
        messages.append(shaped)
    tools = conversation.get("tools")
    return messages, json.loads(tools) if tools else None


def _parse_arguments(call: dict[str, Any], number: int) -> None:
    """Put the arguments of a call in as an object, which templates expect; none at all are an empty one.

    number: that of the message, for the error. Raises InvalidArguments for text that is not JSON: a model would learn
    to write it. JSON that is no object stays as its text.
    """
    function = call.get("function")
    if not isinstance(function, dict):
        return
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        function["arguments"] = {}
    elif isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError as error:
            raise InvalidArguments(
                f"message {number} calls the tool {function.get('name')!r} with arguments that are not JSON ({error}): "
                f"{arguments[:80]!r}; expected a JSON object as text"
            ) from error
        if isinstance(parsed, dict):
            function["arguments"] = parsed
