"""The documents of a batch as columns: what to make, which token runs it consists of, and its tokens.

Shape legend: R requests (documents), P pieces, S spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.arrays import IntArray
from ismdata.conversation import Refusal
from ismdata.pack.conversation_batch import ConversationBatch

#: A document of a batch, by what decides its text: conversation, head, lo and hi of its request.
RequestKey = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Documents to make. Message numbers count within the conversation.

    A document consists of the conversation's first `head` messages (the system prompt, repeated in each part of a
    split conversation) and of messages `lo` to `hi`.

    Attributes:
        conversation: int64[R], number of the conversation in the batch.
        head: int64[R].
        lo: int64[R].
        hi: int64[R], exclusive.
        target_from: int64[R], answers before this message are history and not trained.
        cut: bool[R], whether the document ends with its last answer, without what the template writes after it.
    """

    conversation: IntArray
    head: IntArray
    lo: IntArray
    hi: IntArray
    target_from: IntArray
    cut: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.conversation)

    def take(self, indices: NDArray[Any]) -> Requests:
        """Return the requests selected by integers or booleans."""
        return Requests(**{name: getattr(self, name)[indices] for name in self.__dataclass_fields__})

    @staticmethod
    def concatenate(parts: Sequence[Requests]) -> Requests:
        """Return the requests of all parts, at least one, in order."""
        names = Requests.__dataclass_fields__
        return Requests(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def keys(self, places: Sequence[int]) -> list[RequestKey]:
        """Return the keys of the requests numbered `places`."""
        columns = (self.conversation, self.head, self.lo, self.hi)
        return [
            (int(c), int(head), int(lo), int(hi))
            for c, head, lo, hi in zip(*(column[places] for column in columns), strict=True)
        ]

    def in_batch(self, batch: ConversationBatch, request: IntArray, message: IntArray) -> IntArray:
        """Turn message numbers within documents into numbers within the batch.

        Args:
            batch: The batch of the requests.
            request: The request of each message.
            message: Message numbers within the document, of any shape that `request` broadcasts to.

        Returns:
            Message numbers within the batch.
        """
        head = self.head[request]
        inside = np.where(message < head, message, message - head + self.lo[request])
        numbers: IntArray = batch.first[self.conversation[request]] + inside
        return numbers


@dataclass(frozen=True, kw_only=True)
class PieceTable:
    """The token runs that each document consists of: P pieces, ordered by request.

    Attributes:
        request: int64[P], the document.
        span: int64[P], numbers the spans within the document.
        kind: int64[P], the kind of the span.
        message: int64[P], the assistant message (within the batch) that the piece belongs to; -1 for context.
        run: int64[P], number in the batch's `BatchRuns`.
        length: int64[P], tokens.
        controls: int64[P], control tokens that the template wrote.
        refused: Why documents are refused, by request.
    """

    request: IntArray
    span: IntArray
    kind: IntArray
    message: IntArray
    run: IntArray
    length: IntArray
    controls: IntArray
    refused: Mapping[int, Refusal]

    def document_lengths(self, requests: int) -> IntArray:
        """Return the tokens of each of the `requests` documents, int64[R]."""
        return np.bincount(self.request, weights=self.length, minlength=requests).astype(np.int64)

    def without_tails(self, requests: Requests) -> PieceTable:
        """Return the table without what follows the last answer of documents that are `cut`."""
        last_answer = np.full(len(requests), -1, np.int64)
        answers = self.message >= 0
        np.maximum.at(last_answer, self.request[answers], self.span[answers])
        keep = ~requests.cut[self.request] | (self.span <= last_answer[self.request])
        if keep.all():
            return self
        columns = [name for name in self.__dataclass_fields__ if name != "refused"]
        return PieceTable(**{name: getattr(self, name)[keep] for name in columns}, refused=self.refused)


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """Tokenized documents, stored end to end.

    Attributes:
        input_ids: int32, the tokens of all documents.
        lengths: int64[R], tokens of each document.
        span_counts: int64[R], spans of each document.
        spans: int32[S, 4], the columns START, END, KIND and TRAIN of `ismdata.masks`, offsets within the document.
        span_weights: float32[S], loss weights.
    """

    input_ids: NDArray[np.int32]
    lengths: IntArray
    span_counts: IntArray
    spans: NDArray[np.int32]
    span_weights: NDArray[np.float32]
