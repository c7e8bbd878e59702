"""Plan which documents share a sequence, and in which order: integers in, integers out.

The bins are found on the histogram of lengths (choose.py). Then documents are assigned to them at random: documents of
the same length are grouped and shuffled (grouping.py), and each place for a length in a bin takes the next of them
(placement.py). Sequences are shuffled, and so are the documents in each. So neither the lengths nor the order of the
corpus determine the order of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.arrays import offsets_of
from ismdata.errors import UsageError
from ismdata.memory import keep_freed_blocks
from ismdata.pack.planning.choose import best_bins
from ismdata.pack.planning.grouping import group_by_length
from ismdata.pack.planning.placement import place_documents
from ismdata.pack.planning.work import worker_threads


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each document goes: row r holds the documents `order[offsets[r] : offsets[r + 1]]`, end to end.

    Attributes:
        order: uint32[D], document numbers.
        row_documents: int32[R], documents per row (sequence), at least 1.
    """

    order: NDArray[np.uint32]
    row_documents: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.row_documents)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Offsets of the rows in `order`, int64[R + 1]."""
        return offsets_of(self.row_documents)


def lower_bound(lengths: ArrayLike, seq_len: int) -> int:
    """Return the number of sequences needed if documents could be divided anywhere: ceil(tokens / seq_len).

    Args:
        lengths: integers[D], tokens of each document.
        seq_len: Tokens per sequence.

    Returns:
        A number of sequences that no plan can go below.

    Example:
        >>> lower_bound([5, 3, 2], seq_len=8)
        2
    """
    return -(-int(np.asarray(lengths).sum(dtype=np.int64)) // seq_len)


def plan(lengths: ArrayLike, *, seq_len: int, seed: int) -> Plan:
    """Assign documents to sequences. The same arguments give the same plan on every machine.

    Args:
        lengths: integers[D], tokens of each document, 1 to `seq_len`.
        seq_len: Tokens per sequence.
        seed: Seed of the random assignment.

    Returns:
        The plan.

    Raises:
        UsageError: If `lengths` is not a list of integers, or a length is out of range.

    Example:
        >>> plan([5, 3, 2, 6], seq_len=8, seed=0).row_documents.tolist()
        [2, 2]
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return Plan(order=np.zeros(0, np.uint32), row_documents=np.zeros(0, np.int32))
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise UsageError(f"lengths are {lengths.dtype} of shape {lengths.shape}; expected one integer per document")
    if len(lengths) > np.iinfo(np.uint32).max:
        raise UsageError(f"{len(lengths)} documents; expected fewer than 2^32. Pack the corpus in parts")
    keep_freed_blocks()
    order = np.empty(len(lengths), np.uint32)  # first a buffer for grouping
    with worker_threads() as run:
        grouped, histogram = group_by_length(lengths, seq_len, seed, run, buffer=order)
        bins = best_bins(histogram, seq_len)
        return Plan(order=order, row_documents=place_documents(grouped, bins, order, seed, run))
