"""TokenizedDocuments of a batch as columns: as they are asked for, laid out in pieces, and made.

Shape legend: R requests (documents), P pieces, S spans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.conversation import Refusal
from ismdata.pack.conversation_batch import IntArray


@dataclass(frozen=True, kw_only=True)
class Requests:
    """TokenizedDocuments to make. All arrays have length R; message numbers count within the conversation.

    A document holds the conversation's first `head` messages (the system prompt, repeated in each piece) and then the
    messages lo to hi. Answers before message `target_from` are history. `cut`: it ends with its last answer.
    """

    conversation: IntArray
    head: IntArray
    lo: IntArray
    hi: IntArray
    target_from: IntArray
    cut: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.conversation)

    def equals(self, other: Requests) -> bool:
        """Whether these are the same documents in the same order."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)

    def take(self, indices: NDArray[Any]) -> Requests:
        return Requests(**{name: getattr(self, name)[indices] for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class PieceTable:
    """Which runs of tokens each document is made of: P pieces, ordered by request."""

    request: IntArray  # [P]
    span: IntArray  # [P], numbers the spans within the document
    kind: IntArray  # [P]
    message: IntArray  # [P], the assistant message (in the batch) answered with, -1 for context
    run: IntArray  # [P], a number in the encoder's run table
    length: IntArray  # [P], tokens
    controls: IntArray  # [P], control tokens that the template wrote
    refused: dict[int, Refusal]  # by request

    def document_lengths(self, requests: int) -> IntArray:
        return np.bincount(self.request, weights=self.length, minlength=requests).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """Tokenised documents end to end."""

    input_ids: NDArray[np.int32]  # all tokens
    lengths: IntArray  # [R]
    span_counts: IntArray  # [R]
    spans: NDArray[np.int32]  # [S, 4]: start, end, kind, train, offsets in the document
    span_weights: NDArray[np.float32]  # [S]


def without_tail(layout: PieceTable, requests: Requests) -> PieceTable:
    """Leave out what follows the last answer of documents that are to end with it."""
    last_answer = np.full(len(requests), -1, np.int64)
    answers = layout.message >= 0
    np.maximum.at(last_answer, layout.request[answers], layout.span[answers])
    keep = ~requests.cut[layout.request] | (layout.span <= last_answer[layout.request])
    if keep.all():
        return layout
    columns = ("request", "span", "kind", "message", "run", "length", "controls")
    return PieceTable(**{name: getattr(layout, name)[keep] for name in columns}, refused=layout.refused)
