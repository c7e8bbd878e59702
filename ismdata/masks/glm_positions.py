"""The two positions of each token in the GLM layout (Figure 2 of the ISM paper). numpy only.

| token | position 1 | position 2 |
|---|---|---|
| context, `[MASK]` | its 1-based index in the document | 0 |
| `[START]`, answer | that of its `[MASK]` | 1, 2, 3 … from `[START]` on |
| padding | 0 | 0 |

>>> from ismdata.masks import QUERY
>>> spans = [(0, 4, QUERY, 0), (4, 5, ANSWER, 0), (5, 7, ANSWER, 1)]  # three tokens and [MASK], [START], two tokens
>>> first, second = positions([7], spans, seq_len=8)
>>> first.tolist(), second.tolist()
([1, 2, 3, 4, 4, 4, 4, 0], [0, 0, 0, 0, 1, 2, 3, 0])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.masks.intervals import ANSWER, IntArray, Tiling, tile

#: Tokens of a context or of an answer: (is an answer, ids).
Block = tuple[bool, list[int]]


def answer_runs(tiling: Tiling) -> IntArray:
    """The spans that begin a maximal run of answer spans: in the GLM layout those that hold `[START]`.

    Args:
        tiling: The spans of whole rows.

    Returns:
        int64[runs], indices into the tiling.
    """
    answer = tiling.kind == ANSWER
    continues = np.zeros(len(answer), bool)
    continues[1:] = answer[1:] & answer[:-1] & (tiling.document[1:] == tiling.document[:-1])
    return np.flatnonzero(answer & ~continues)


def tiled_positions(tiling: Tiling) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Both positions of the tokens of R rows.

    A maximal run of answer spans begins with `[START]`, and the token before it is its `[MASK]`.

    Args:
        tiling: The spans of the rows.

    Returns:
        Position 1 and position 2, int32[R * T] each.
    """
    answer = tiling.kind == ANSWER
    begins = answer_runs(tiling)
    run_start = np.zeros(len(answer), np.int64)
    run_start[begins] = tiling.start[begins]
    run_start = np.maximum.accumulate(run_start)
    token = np.arange(int(tiling.length.sum()))
    in_answer = np.repeat(answer, tiling.length)
    run = np.repeat(run_start, tiling.length)
    document = np.repeat(tiling.document_start, tiling.length)
    first = np.where(in_answer, run, token + 1) - document
    second = np.where(in_answer, token + 1 - run, 0)
    first[np.repeat(tiling.kind < 0, tiling.length)] = 0
    return first.astype(np.int32), second.astype(np.int32)


def positions(seq_lens: ArrayLike, spans: ArrayLike, *, seq_len: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Both positions of the tokens of one sequence.

    Args:
        seq_lens: int[D], lengths of the documents. The rest of `seq_len` is padding.
        spans: int[S, 4] of start, end, kind, train, with `[MASK]` and `[START]`.
        seq_len: Tokens of the sequence, T.

    Returns:
        Position 1 and position 2, int32[T] each.

    Raises:
        DataError: If the spans do not tile the documents.
    """
    lens = np.asarray(seq_lens, np.int64).reshape(-1)
    table = np.asarray(spans, np.int64).reshape(-1, 4)
    return tiled_positions(tile([len(lens)], lens, [len(table)], table, seq_len=seq_len))


def block_positions(blocks: Sequence[Block], *, past: int = 0) -> tuple[list[int], list[int]]:
    """Both positions of the tokens of contexts and answers that are fed to a model.

    Args:
        blocks: Contexts and answers in order, with `[MASK]` and `[START]`.
        past: How many tokens of the document were fed before.

    Returns:
        Position 1 and position 2, one entry per token.

    >>> block_positions([(False, [7, 8, 9]), (True, [1, 5])])
    ([1, 2, 3, 3, 3], [0, 0, 0, 1, 2])
    """
    first: list[int] = []
    second: list[int] = []
    for is_answer, ids in blocks:
        ones, twos = token_positions(past, len(ids), start=past if is_answer else None)
        first += ones
        second += twos
        past += len(ids)
    return first, second


def token_positions(past: int, count: int, *, start: int | None) -> tuple[list[int], list[int]]:
    """Both positions of consecutive tokens that are fed to a model.

    Args:
        past: How many tokens of the document were fed before.
        count: How many tokens are fed.
        start: The 0-based index, in the document, of the `[START]` of their answer; None for context.

    Returns:
        Position 1 and position 2, one entry per token.
    """
    if start is None:
        return list(range(past + 1, past + count + 1)), [0] * count
    return [start] * count, list(range(past - start + 1, past - start + count + 1))
