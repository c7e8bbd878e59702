"""Intervals to the index tables of the varlen backend, which computes attention in two passes. numpy only.

Pass 1 is causal attention inside each document. Pass 2 is what `ism` and `prefix` add to it: the rows of a context
block `[s, e)` see later keys, up to `e`. Rows s … e-2 against the keys s+1 … e-1, both in reverse order, are an
ordinary causal problem: reversed row i is row e-2-i and sees the keys e-1-i … e-1, the first i+1 of the reversed keys.

>>> table = tables([[0, 0, 0, 0, 0, 5, 5, 7]], [[3, 3, 3, 4, 5, 7, 7, 8]])  # context of 3, answer of 2 | context of 2
>>> table.documents.tolist(), table.alone.tolist()
([0, 5, 7, 8], [7])
>>> table.rows.tolist(), table.blocks.tolist(), (table.longest_document, table.longest_block)
([1, 0, 5], [0, 2, 3], (5, 2))

Shape legend: B samples, T = seq_len, N parts of pass 1, S single rows, M context blocks, R rows of pass 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.errors import UsageError

#: Rows that see only themselves (mostly padding) go through pass 1 in parts of this many rows, which costs next to
#: nothing. In parts of one row, each would cost a block of memory and work; a single part would take time quadratic in
#: their number.
PIECE = 128


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of both passes, for the B * T rows of a micro-batch whose samples are laid end to end."""

    #: int32[N + 1]: where the parts of pass 1 begin, and B * T.
    documents: NDArray[np.int32]
    #: int32[S]: the rows that see only themselves: padding, and documents of one token.
    alone: NDArray[np.int32]
    #: int32[R]: the rows of pass 2, block by block, each block in reverse order. The key of row r is r + 1.
    rows: NDArray[np.int32]
    #: int32[M + 1]: where the blocks begin in `rows`, and R.
    blocks: NDArray[np.int32]
    #: Rows of the longest part of pass 1 and of the longest block of pass 2 (0 if there is none).
    longest_document: int
    longest_block: int

    def as_batch(self) -> dict[str, NDArray[np.generic]]:
        """The tables by their names in a batch.

        `varlen_longest` has no elements. Its shape [0, B * T, longest_document, longest_block] tells the host what it
        needs: unlike reading a tensor on a GPU, reading a shape does not wait for the device.
        """
        shape = (0, int(self.documents[-1]), self.longest_document, self.longest_block)
        return {
            "varlen_documents": self.documents,
            "varlen_alone": self.alone,
            "varlen_rows": self.rows,
            "varlen_blocks": self.blocks,
            "varlen_longest": np.empty(shape, np.uint8),
        }


#: The tables' names in a batch.
NAMES = ("varlen_documents", "varlen_alone", "varlen_rows", "varlen_blocks", "varlen_longest")


def tables(doc_start: ArrayLike, kv_end: ArrayLike) -> Tables:
    """Make the tables of a batch.

    Args:
        doc_start: int[B, T].
        kv_end: int[B, T].

    Returns:
        The tables.

    Raises:
        UsageError: If the intervals are not those of ism, causal or prefix: documents must be causal except for context
            blocks, in which all rows see up to the same key. The message names the row.
    """
    start = np.asarray(doc_start, np.int64)
    end = np.asarray(kv_end, np.int64)
    batch, seq_len = start.shape
    row = np.arange(seq_len)
    opens = start == row
    ahead = end > row + 1
    _check(start, end, opens, ahead)

    closes = np.ones_like(opens)  # last rows of documents
    closes[:, :-1] = opens[:, 1:]
    is_alone = opens & closes
    continues = np.zeros_like(is_alone)  # a single row after another
    continues[:, 1:] = is_alone[:, 1:] & is_alone[:, :-1]
    place = row - np.maximum.accumulate(np.where(continues, 0, row), axis=1)
    begins = np.where(is_alone, place % PIECE == 0, opens)
    documents = np.append(np.flatnonzero(begins), batch * seq_len)

    rows = np.flatnonzero(ahead)
    ends = (end + (np.arange(batch) * seq_len)[:, None]).ravel()[rows]
    begin_block = np.flatnonzero(np.diff(ends, prepend=-1))
    blocks = np.append(begin_block, len(rows))
    lengths = np.diff(blocks)
    mirrored = np.repeat(blocks[:-1] + blocks[1:] - 1, lengths) - np.arange(len(rows))
    return Tables(
        documents=documents.astype(np.int32),
        alone=np.flatnonzero(is_alone).astype(np.int32),
        rows=rows[mirrored].astype(np.int32),
        blocks=blocks.astype(np.int32),
        longest_document=int(np.diff(documents).max(initial=0)),
        longest_block=int(lengths.max(initial=0)),
    )


def _check(
    start: NDArray[np.int64], end: NDArray[np.int64], opens: NDArray[np.bool_], ahead: NDArray[np.bool_]
) -> None:
    """Raise UsageError unless documents follow one another and a row that sees ahead is followed by one with its end.

    By induction from a block's last row backwards, all rows of a block then see up to the same key.
    """
    row = np.arange(start.shape[1])
    wrong = end <= row
    wrong[:, 0] |= ~opens[:, 0]
    wrong[:, 1:] |= ~opens[:, 1:] & (start[:, 1:] != start[:, :-1])
    wrong[:, -1] |= ahead[:, -1]
    wrong[:, :-1] |= ahead[:, :-1] & ((end[:, 1:] != end[:, :-1]) | opens[:, 1:])
    if wrong.any():
        sample, at = (int(index) for index in np.argwhere(wrong)[0])
        raise UsageError(
            f"row {at} of sample {sample} sees the keys {start[sample, at]} to {end[sample, at]}; varlen expects the "
            "intervals of ism, causal or prefix: consecutive documents, and context blocks in which every row sees up "
            "to the block's end. Use the backend sdpa or flex for other intervals"
        )
