"""Pieces of documents as columns, and what is known of a batch before its turn comes.

Shape legend: R requests (documents), P pieces, K distinct texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.arrays import ragged_arange
from ismdata.conversation import Refusal
from ismdata.pack.conversation_batch import ConversationBatch, IntArray
from ismdata.pack.requests import Requests
from ismdata.rendering import Piece


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """What conversations of the same roles are made of, by its number."""

    number: int
    columns: IntArray  # [pieces, 6 + slots]: span, kind, message, run, shape, controls, messages in the slots


@dataclass(frozen=True, kw_only=True)
class PieceBlock:
    """Pieces of some requests, all columns [P], those of one request together and in order."""

    request: IntArray
    span: IntArray
    kind: IntArray
    message: IntArray  # within the conversation's document, the one answered with; -1 for context
    run: IntArray
    controls: IntArray

    def of(self, places: IntArray, requests: IntArray, count: int) -> PieceBlock:
        """The pieces of the requests numbered `places`, of `count` in all, which get the numbers `requests`."""
        if len(places) == count and np.array_equal(places, requests):
            return self
        sizes = np.bincount(self.request, minlength=count)
        rows = ragged_arange((np.cumsum(sizes) - sizes)[places], sizes[places])
        columns = {name: getattr(self, name)[rows] for name in self.__dataclass_fields__}
        return PieceBlock(**columns | {"request": np.repeat(requests, sizes[places])})


NO_PIECES = PieceBlock(**{name: np.empty(0, np.int64) for name in PieceBlock.__dataclass_fields__})


def joined(blocks: Sequence[PieceBlock]) -> PieceBlock:
    """All pieces, ordered by request. No two blocks have pieces of the same one."""
    blocks = [block for block in blocks if len(block.request)]
    if len(blocks) < 2:  # most often all pieces come from one
        return blocks[0] if blocks else NO_PIECES
    order = np.argsort(np.concatenate([block.request for block in blocks]), kind="stable")
    return PieceBlock(
        **{
            name: np.concatenate([getattr(block, name) for block in blocks])[order]
            for name in PieceBlock.__dataclass_fields__
        }
    )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts to encode in one go, and of each the number of what it is the text of."""

    texts: pa.LargeStringArray
    opening: bool
    places: IntArray


#: A document of the batch, by the columns of its request that decide what it says.
RequestKey = tuple[int, int, int, int]


def request_keys(requests: Requests, places: Sequence[int]) -> list[RequestKey]:
    """The keys of the requests numbered `places`."""
    columns = (requests.conversation, requests.head, requests.lo, requests.hi)
    return [
        (int(c), int(head), int(lo), int(hi))
        for c, head, lo, hi in zip(*(column[places] for column in columns), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Documents that were rendered by themselves: the pieces of each, or why it has none."""

    documents: Mapping[RequestKey, tuple[Piece, ...] | Refusal]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all documents, end to end."""
        return [piece for found in self.documents.values() if not isinstance(found, Refusal) for piece in found]

    def texts(self, first: int) -> list[Texts]:
        """The texts among the pieces, the first piece having the number `first`."""
        groups = []
        for opening in (False, True):
            chosen = [
                (first + k, "".join(map(str, piece.parts)))
                for k, piece in enumerate(self.pieces)
                if piece.ids is None and piece.opening is opening
            ]
            if chosen:
                places, texts = zip(*chosen, strict=True)
                groups.append(
                    Texts(texts=pa.array(texts, pa.large_string()), opening=opening, places=np.array(places, np.int64))
                )
        return groups


def together(groups: Iterable[Texts], *, apart: bool) -> list[Texts]:
    """The same in one group, or where it makes a difference whether they open a document, in one of each kind."""
    found = [group if apart else replace(group, opening=False) for group in groups]
    joined: list[Texts] = []
    for opening in (False, True):
        own = [group for group in found if group.opening is opening]
        if len(own) == 1:
            joined.append(own[0])
        elif own:
            texts = pa.concat_arrays([group.texts for group in own])
            places = np.concatenate([group.places for group in own])
            joined.append(Texts(texts=texts, opening=opening, places=places))
    return joined


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A batch whose texts are being encoded. Made by DocumentEncoder.ahead, taken by its `begin`.

    requests: its documents as they will most likely be asked for; skeleton_of and refused are by their numbers. block:
    the pieces of those that have a skeleton, all of them ordered by request; the runs of `texts` are open until the
    texts are encoded: each is that of the key which `key_of` says. rendered: those that have none.
    """

    batch: ConversationBatch
    requests: Requests
    skeleton_of: IntArray  # [R], -1 for none
    refused: Mapping[int, Refusal]
    block: PieceBlock
    texts: IntArray  # pieces that are texts
    key_of: IntArray  # of each of them
    keys: IntArray  # [K, 1 + slots], no two alike
    rendered: Rendered
    groups: Sequence[Texts]  # of the keys, and of the pieces of what is rendered, which are numbered from K on
    encoded: Sequence[Future[tuple[NDArray[np.int32], IntArray]]]  # of each group

    def with_runs(self, runs: IntArray) -> Ahead:
        """The same with the runs of the keys put in."""
        run = self.block.run.copy()
        run[self.texts] = runs[self.key_of]
        return replace(self, block=replace(self.block, run=run))

    def places(self, requests: Requests) -> IntArray:
        """Of each request, the number of the one here that is laid out alike; -1 where there is none."""
        columns = ("conversation", "head", "lo", "hi")
        here, asked = (
            np.stack([getattr(of, name) for name in columns], axis=1, dtype=np.int64)
            for of in (self.requests, requests)
        )
        if np.array_equal(here, asked):
            return np.arange(len(asked))
        numbers, firsts = distinct(np.concatenate([here, asked]))
        places = firsts[numbers[len(here) :]]
        return np.where(places < len(here), places, -1)


def distinct(rows: IntArray) -> tuple[IntArray, IntArray]:
    """Numbers of equal rows, in the order in which they first come, int[n]; and where each number first comes.

    By hashes: a quarter of the time that sorting rows takes.
    """
    width = rows.shape[1] * rows.itemsize
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])
    encoded = column.dictionary_encode()
    numbers = encoded.indices.to_numpy()
    firsts = np.empty(len(encoded.dictionary), np.int64)
    firsts[numbers[::-1]] = np.arange(len(rows))[::-1]
    return numbers, firsts


def pad(matrix: IntArray, width: int) -> IntArray:
    """More columns of -1 on the right."""
    missing = width - matrix.shape[1]
    return np.pad(matrix, ((0, 0), (0, missing)), constant_values=-1) if missing else matrix
