"""What all batches of a corpus share: how it is encoded, and the skeletons of its conversations.

Conversations with the same sequence of roles have the same text around their messages. A skeleton is that text, cut
into pieces: a piece is either a known run of tokens, or a text with slots for contents, which is encoded once the
contents are known.

Nothing here loops over messages or tokens in Python.

Shape legend: R requests (documents), P pieces, K texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ismdata.arrays import IntArray, offsets_of, ragged_arange
from ismdata.conversation import ROLES, Refusal
from ismdata.errors import Refused
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.pieces import NO_PIECES, PieceBlock, pad_columns
from ismdata.pack.requests import Requests
from ismdata.pack.token_runs import RunTable
from ismdata.rendering import (
    Encoding,
    NotDecomposable,
    Piece,
    SkeletonBuilder,
    Slot,
    TokenizerEngine,
)

#: Columns of `SkeletonTable.columns`; from SLOTS on, the numbers of the messages in the text's slots.
SPAN, KIND, MESSAGE, RUN, SHAPE, CONTROLS, SLOTS = range(7)

#: A text without its contents: strings, and for each slot what the template strips on the left and on the right.
TextShape = tuple[str | tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class SkeletonTable:
    """The pieces of a skeleton as columns.

    Attributes:
        number: Number of the skeleton in its cache.
        columns: int64[P, 6 + slots], -1 where a column does not apply: known runs have no shape, texts no run.
    """

    number: int
    columns: IntArray


@dataclass(frozen=True, kw_only=True)
class SkeletonMatch:
    """Which skeletons documents have.

    Attributes:
        skeleton: int64[R], number of the skeleton; -1 for documents to render individually.
        refused: Documents whose roles the template refuses, by request.
    """

    skeleton: IntArray
    refused: dict[int, Refusal]

    def individual(self) -> list[int]:
        """Return the requests that have neither a skeleton nor a refusal."""
        return [r for r in np.flatnonzero(self.skeleton < 0).tolist() if r not in self.refused]


@dataclass(frozen=True, kw_only=True)
class FilledSkeletons:
    """The pieces of documents that have a skeleton, their texts not encoded yet.

    Attributes:
        block: The pieces; the run numbers of texts are not set yet.
        texts: int64[K], the pieces that are texts.
        keys: int64[K, 1 + slots], of each text its shape and the messages (within the batch) in its slots.
    """

    block: PieceBlock
    texts: IntArray
    keys: IntArray


class SkeletonCache:
    """How a corpus is encoded, and what its batches share.

    Args:
        encoding: The tokenizer and its chat template.
        backend: Encodes texts; the tokenizer's reference implementation by default.
        use_skeletons: Whether skeletons fit the template; if not, all documents are rendered individually.
        without_reasoning: Whether reasoning in answers is not trained.
    """

    def __init__(
        self,
        encoding: Encoding,
        *,
        backend: TokenizerEngine | None = None,
        use_skeletons: bool = True,
        without_reasoning: bool = False,
    ) -> None:
        reference = encoding.tokenizer.reference
        self.encoding = encoding
        self.backend = backend or reference
        self.use_skeletons = use_skeletons
        self.without_reasoning = without_reasoning
        #: Whether the tokenizer encodes a text differently if it opens a document.
        self.openings_differ = reference.opening is not reference.inside
        #: The known runs of all skeletons.
        self.runs = RunTable()
        #: For each shape, whether its texts open a document, and the shape.
        self.shapes: list[tuple[bool, TextShape]] = []
        self._shape_numbers: dict[tuple[bool, TextShape], int] = {}
        self._tables: list[SkeletonTable] = []
        self._by_roles: dict[bytes, SkeletonTable | Refusal | None] = {}
        self._builder = SkeletonBuilder(encoding.renderer, encoding.tokenizer, encoding.history)

    def match(self, batch: ConversationBatch, requests: Requests) -> SkeletonMatch:
        """Find the skeleton of each document, building those that are missing."""
        first = batch.first[requests.conversation]
        sizes = np.stack([requests.head, requests.hi - requests.lo], axis=1).reshape(-1)
        starts = np.stack([first, first + requests.lo], axis=1).reshape(-1)
        codes = batch.roles[ragged_arange(starts, sizes)]
        offsets = offsets_of(sizes[::2] + sizes[1::2])
        roles = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(requests), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(codes))]
        ).dictionary_encode()
        numbers: list[int] = []
        refusals: dict[int, Refusal] = {}
        for place, key in enumerate(roles.dictionary.to_pylist()):
            found = self._skeleton(key)
            numbers.append(found.number if isinstance(found, SkeletonTable) else -1)
            if isinstance(found, Refusal):
                refusals[place] = found
        indices = roles.indices.to_numpy()
        skeleton = np.array(numbers, np.int64)[indices] if len(requests) else np.empty(0, np.int64)
        individual = batch.individual[requests.conversation] | (not self.use_skeletons)
        skeleton[individual] = -1
        refused = {
            request: refusal
            for place, refusal in refusals.items()
            for request in np.flatnonzero((indices == place) & ~individual).tolist()
        }
        return SkeletonMatch(skeleton=skeleton, refused=refused)

    def fill(
        self, batch: ConversationBatch, requests: Requests, matched: IntArray, skeleton: IntArray
    ) -> FilledSkeletons:
        """Put the messages of documents into their skeletons.

        Args:
            batch: The batch.
            requests: Its documents.
            matched: The requests that have a skeleton.
            skeleton: The skeleton of each of these.

        Returns:
            Their pieces.
        """
        if not len(matched):
            return FilledSkeletons(block=NO_PIECES, texts=np.empty(0, np.int64), keys=np.empty((0, 1), np.int64))
        used, inverse = np.unique(skeleton, return_inverse=True)
        tables = [self._tables[number].columns for number in used.tolist()]
        width = max(table.shape[1] for table in tables)
        counts = np.array([len(table) for table in tables])
        starts = np.cumsum(counts) - counts
        rows = ragged_arange(starts[inverse], counts[inverse])
        pieces = np.concatenate([pad_columns(table, width) for table in tables])[rows]
        request = np.repeat(matched, counts[inverse])
        texts = np.flatnonzero(pieces[:, SHAPE] >= 0)
        slots = pieces[texts, SLOTS:]
        messages = requests.in_batch(batch, request[texts, None], slots)
        keys = np.concatenate([pieces[texts, SHAPE, None], np.where(slots < 0, -1, messages)], axis=1)
        block = PieceBlock(
            request=request,
            span=pieces[:, SPAN].copy(),
            kind=pieces[:, KIND].copy(),
            message=pieces[:, MESSAGE].copy(),
            run=pieces[:, RUN].copy(),
            controls=pieces[:, CONTROLS].copy(),
        )
        return FilledSkeletons(block=block, texts=texts, keys=keys)

    def glm_runs(self) -> tuple[int, int]:
        """Return the runs that hold `[MASK]` and `[START]` of the GLM layout."""
        glm = self.encoding.glm
        assert glm is not None
        return self.runs.share((glm.mask_id,)), self.runs.share((glm.start_id,))

    def _skeleton(self, key: bytes) -> SkeletonTable | Refusal | None:
        """The skeleton of a sequence of role codes, why the template refuses it, or None if slots cannot express it."""
        if key not in self._by_roles:
            found: SkeletonTable | Refusal | None
            roles = [ROLES[code] for code in key]
            try:
                pieces = self._builder.build(roles)
            except NotDecomposable:
                found = None
            except Refused as error:
                found = Refusal(reason=error.reason, detail=error.detail)
            else:
                found = self._tabulate(pieces)
                self._tables.append(found)
            self._by_roles[key] = found
        return self._by_roles[key]

    def _tabulate(self, pieces: Sequence[Piece]) -> SkeletonTable:
        """Pieces as columns. All skeletons share runs and shapes."""
        width = max((sum(isinstance(part, Slot) for part in piece.parts) for piece in pieces), default=0)
        columns = np.full((len(pieces), SLOTS + width), -1, np.int64)
        for row, piece in zip(columns, pieces, strict=True):
            row[[SPAN, KIND, MESSAGE, CONTROLS]] = piece.span, piece.kind, piece.message, piece.controls
            if piece.ids is not None:
                row[RUN] = self.runs.share(piece.ids)
            else:
                slots = [part.message for part in piece.parts if isinstance(part, Slot)]
                row[SHAPE] = self._shape(piece)
                row[SLOTS : SLOTS + len(slots)] = slots
        return SkeletonTable(number=len(self._tables), columns=columns)

    def _shape(self, piece: Piece) -> int:
        """The number of a piece's shape."""
        parts: Any = (part if isinstance(part, str) else (part.left, part.right) for part in piece.parts)
        key = (piece.opening, tuple(parts))
        if key not in self._shape_numbers:
            self._shape_numbers[key] = len(self.shapes)
            self.shapes.append(key)
        return self._shape_numbers[key]
