"""Pieces of documents as columns, and what is known of a batch before its turn comes.

Shape legend: R requests (documents), P pieces, K distinct texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.batch import ConversationBatch, IntArray
from ismdata.conversation import Refusal
from ismdata.document_columns import Requests
from ismdata.runs import ragged_arange


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
    """Texts to encode in one go, and of each its key, by number."""

    texts: pa.LargeStringArray
    opening: bool
    places: IntArray


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A batch whose texts are being encoded. Made by DocumentEncoder.ahead, taken by its `begin`.

    requests: its documents as they will most likely be asked for; skeleton_of and refused are by their numbers. block:
    the pieces of those that have a skeleton, all of them ordered by request; the runs of `texts` are open until the
    texts are encoded: each is that of the key which `key_of` says.
    """

    batch: ConversationBatch
    requests: Requests
    skeleton_of: IntArray  # [R], -1 for none
    refused: Mapping[int, Refusal]
    block: PieceBlock
    texts: IntArray  # pieces that are texts
    key_of: IntArray  # of each of them
    keys: IntArray  # [K, 1 + slots], no two alike
    groups: Sequence[Texts]
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
