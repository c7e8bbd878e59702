"""A record batch of converted conversations as columns, as tokenizing reads it.

Shape legend: C conversations, M messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import IntArray
from ismdata.choices import TrainOn
from ismdata.conversation import ASSISTANT, ROLES, SYSTEM
from ismdata.rendering import REASONING_END, SPECIAL_FIELDS, Sensitivity


@dataclass(frozen=True, kw_only=True)
class ConversationBatch:
    """Converted conversations as columns.

    Attributes:
        rows: The conversations.
        contents: [M], the messages' contents; null is the empty string.
        roles: uint8[M], codes of `conversation.ROLES`.
        first: int64[C + 1], offsets of each conversation's messages.
        trained: bool[M], assistant messages to train.
        weight: float32[M], 1 for messages without a weight; None if no message has one.
        individual: bool[C], conversations that must be rendered individually, because skeletons do not cover them.
    """

    rows: pa.RecordBatch
    contents: pa.LargeStringArray
    roles: NDArray[np.uint8]
    first: IntArray
    trained: NDArray[np.bool_]
    weight: NDArray[np.float32] | None
    individual: NDArray[np.bool_]

    @classmethod
    def from_rows(cls, rows: pa.RecordBatch, sensitivity: Sensitivity, train_on: TrainOn = "all") -> ConversationBatch:
        """Build the columns.

        Args:
            rows: Conversations of `CONVERSATION_SCHEMA`.
            sensitivity: Which contents make the template do more than write them.
            train_on: Which answers are trained, of those that the messages' own flags leave.

        Returns:
            The batch.
        """
        messages = rows.column("messages")
        fields = messages.flatten()
        first = messages.offsets.to_numpy().astype(np.int64)
        first = first - first[0]
        contents = pc.fill_null(fields.field("content"), "").cast(pa.large_string())
        codes = pc.index_in(fields.field("role"), value_set=pa.array(ROLES)).to_numpy(zero_copy_only=False)
        roles = codes.astype(np.uint8)
        special = _special_messages(fields, contents, sensitivity, train_on)
        counted = np.concatenate([[0], np.cumsum(special)])
        individual = counted[first[1:]] > counted[first[:-1]]
        individual |= sensitivity.everything
        individual |= rows.column("tools").is_valid().to_numpy(zero_copy_only=False)

        trained = (roles == ASSISTANT) & pc.fill_null(fields.field("train"), True).to_numpy(zero_copy_only=False)
        weight = None
        if fields.field("weight").null_count < len(fields):
            weight = pc.fill_null(fields.field("weight"), 1.0).to_numpy(zero_copy_only=False).astype(np.float32)
            trained &= weight != 0
        if train_on == "last":
            trained = _last_of_each(trained, first)
        return cls(
            rows=rows,
            contents=contents,
            roles=roles,
            first=first,
            trained=trained,
            weight=weight,
            individual=individual,
        )

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def heads(self) -> IntArray:
        """How many system messages each conversation begins with, int64[C]."""
        other = np.append(np.flatnonzero(self.roles != SYSTEM), len(self.roles))
        heads: IntArray = np.minimum(other[np.searchsorted(other, self.first[:-1])], self.first[1:]) - self.first[:-1]
        return heads

    def conversation(self, c: int) -> dict[str, Any]:
        """Return conversation c as JSON has it, without null fields."""
        row = self.rows.slice(c, 1).to_pylist()[0]
        row["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
        return {key: value for key, value in row.items() if value is not None}


def _special_messages(
    fields: pa.StructArray, contents: pa.LargeStringArray, sensitivity: Sensitivity, train_on: TrainOn
) -> NDArray[np.bool_]:
    """Messages that skeletons do not cover, bool[M]."""
    special = np.zeros(len(contents), bool)
    for name in SPECIAL_FIELDS:
        if fields.field(name).null_count < len(fields):
            special |= fields.field(name).is_valid().to_numpy(zero_copy_only=False)
    if sensitivity.blank:
        special |= pc.equal(pc.utf8_trim_whitespace(contents), "").to_numpy(zero_copy_only=False)
    for trigger in sensitivity.triggers:
        special |= pc.match_substring(contents, trigger).to_numpy(zero_copy_only=False)
    if train_on == "content":  # only an individual rendering shows where reasoning ends
        special |= pc.match_substring_regex(contents, REASONING_END).to_numpy(zero_copy_only=False)
    return special


def _last_of_each(trained: NDArray[np.bool_], first: IntArray) -> NDArray[np.bool_]:
    """The last trained message of each conversation, bool[M]."""
    answers = np.flatnonzero(trained)
    owner = np.searchsorted(first, answers, side="right")
    last = np.zeros(len(trained), bool)
    last[answers[np.append(owner[1:] != owner[:-1], True)] if len(answers) else answers] = True
    return last
