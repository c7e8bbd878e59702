"""Converted conversations as columns: what the tokenizing road reads of a record batch.

Shape legend: C conversations, M messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.choices import TrainOn
from ismdata.conversation import ASSISTANT, ROLES, SYSTEM
from ismdata.rendering import REASONING_END, SPECIAL_FIELDS, Sensitivity

IntArray = NDArray[np.int64]


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
    for name in SPECIAL_FIELDS:
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
