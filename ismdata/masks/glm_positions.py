"""The two positions of each token in the GLM layout (Figure 2 of the paper). numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.masks.intervals import ANSWER, IntArray, Tiling, tile

#: Tokens to feed in order: (is part of an answer, ids).
Block = tuple[bool, list[int]]


def opened_runs(tiling: Tiling) -> IntArray:
    """The pieces with which a maximal run of answer spans begins, int64[runs]."""
    answer = tiling.kind == ANSWER
    goes_on = np.zeros(len(answer), bool)
    goes_on[1:] = answer[1:] & answer[:-1] & (tiling.document[1:] == tiling.document[:-1])
    return np.flatnonzero(answer & ~goes_on)


def tiled_positions(tiling: Tiling) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Position 1 and position 2 of whole rows laid end to end, int32[R * T] each. Source: Figure 2 of the paper.

    A maximal run of answer spans begins with `[START]`, and the token before it is its `[MASK]`.
    """
    answer = tiling.kind == ANSWER
    opened = opened_runs(tiling)
    run_start = np.zeros(len(answer), np.int64)
    run_start[opened] = tiling.start[opened]
    run_start = np.maximum.accumulate(run_start)
    place = np.arange(int(tiling.length.sum()))
    in_answer = np.repeat(answer, tiling.length)
    run = np.repeat(run_start, tiling.length)
    document = np.repeat(tiling.document_start, tiling.length)
    first = np.where(in_answer, run, place + 1) - document
    second = np.where(in_answer, place + 1 - run, 0)
    first[np.repeat(tiling.kind < 0, tiling.length)] = 0
    return first.astype(np.int32), second.astype(np.int32)


def positions(seq_lens: ArrayLike, spans: ArrayLike, *, seq_len: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Position 1 and position 2 of one sequence whose spans have `[MASK]` and `[START]` in, int32[T] each.

    seq_lens: int[D], document lengths. spans: int[S, 4] of start, end, kind, train, offsets in the sequence. Raises
    DataError when the spans do not tile the documents.
    """
    lens = np.asarray(seq_lens, np.int64).reshape(-1)
    table = np.asarray(spans, np.int64).reshape(-1, 4)
    return tiled_positions(tile([len(lens)], lens, [len(table)], table, seq_len=seq_len))


def block_positions(blocks: Sequence[Block], *, past: int = 0) -> tuple[list[int], list[int]]:
    """Position 1 and position 2 of the tokens of marked blocks that are fed after `past` tokens of their document."""
    first: list[int] = []
    second: list[int] = []
    for is_answer, ids in blocks:
        ones, twos = token_positions(past, len(ids), start=past if is_answer else None)
        first += ones
        second += twos
        past += len(ids)
    return first, second


def token_positions(past: int, count: int, *, start: int | None) -> tuple[list[int], list[int]]:
    """Position 1 and position 2 of `count` tokens that are fed after `past` tokens of their document.

    start: the place (counted from 0) of the `[START]` of the answer that they belong to; None for context.
    """
    if start is None:
        return list(range(past + 1, past + count + 1)), [0] * count
    return [start] * count, list(range(past - start + 1, past - start + count + 1))
