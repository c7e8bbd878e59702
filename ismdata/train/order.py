"""The order in which a run sees its sequences: a seeded permutation for each pass over the data, one after the other.

The order depends on the seed and on the number of sequences, not on the batch size or the number of processes.
A resumed run therefore sees the same sequences, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ismdata import masks
from ismdata.data import PackedDataset, Sample, shards

#: The row number of a sequence that is all padding. Such rows fill the last step and the last evaluation batch.
PADDING_ROW = -1


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which sequences each step sees.

    Args:
        sequences: The number of sequences in the dataset.
        total: The number of sequences that the run sees, over all passes.
        global_batch: Sequences per step, over all micro-batches and processes.
        seed: Decides the permutations.
    """

    sequences: int
    total: int
    global_batch: int
    seed: int

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return math.ceil(self.total / self.global_batch)

    def permutation(self, number: int) -> NDArray[np.int64]:
        """The sequences in the order of pass `number`, int64[sequences], read-only."""
        return _permutation(self.seed, number, self.sequences)

    def step(self, number: int) -> list[int]:
        """The sequences of step `number`, counted from 0; PADDING_ROW where the run has no more.

        >>> order = Order(sequences=3, total=5, global_batch=2, seed=0)
        >>> [order.step(number) for number in range(order.steps)]
        [[2, 0], [1, 2], [0, -1]]
        """
        first = number * self.global_batch
        return [self[place] for place in range(first, first + self.global_batch)]

    def __getitem__(self, place: int) -> int:
        """The sequence at a place of the run, counted from 0."""
        number, at = divmod(place, self.sequences)
        return int(self.permutation(number)[at]) if place < self.total else PADDING_ROW

    def __len__(self) -> int:
        """The places of the run, the padding of its last step included."""
        return self.steps * self.global_batch

    def __iter__(self) -> Iterator[int]:
        return (self[place] for place in range(len(self)))


@lru_cache(maxsize=2)  # a batch may hold the end of one pass and the beginning of the next
def _permutation(seed: int, number: int, sequences: int) -> NDArray[np.int64]:
    permutation = np.random.default_rng((seed, number)).permutation(sequences)
    permutation.flags.writeable = False
    return permutation


class OrderedDataset(Dataset[Sample]):
    """The sequences of a packed dataset in the order of a run: item p is the sequence at place p."""

    def __init__(self, dataset: PackedDataset, order: Order) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Sample:
        row = self.order[place]
        return padding_sample(self.dataset) if row == PADDING_ROW else self.dataset[row]


class PaddedDataset(Dataset[Sample]):
    """A packed dataset, filled up with padding to a multiple of `multiple`, so that batches divide it evenly."""

    def __init__(self, dataset: PackedDataset, multiple: int) -> None:
        self.dataset = dataset
        self.length = math.ceil(len(dataset) / multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> Sample:
        return self.dataset[row] if row < len(self.dataset) else padding_sample(self.dataset)


def padding_sample(dataset: PackedDataset) -> Sample:
    """A sequence that is all padding, of the length of those in `dataset`."""
    seq_len = dataset.seq_len
    no_spans = np.zeros((0, 4), np.int32)
    doc_start, kv_end = masks.intervals([], no_spans, seq_len=seq_len, mask=dataset.mask)
    return Sample(
        mask=dataset.mask,
        sequence=shards.PackedSequence(
            input_ids=np.full(seq_len, dataset.shards.index["tokenizer"].get("pad_id") or 0, np.int32),
            position_ids=np.zeros(seq_len, np.int32),
            position_ids_2=np.zeros(seq_len, np.int32) if dataset.layout == "glm" else None,
            loss_mask=np.zeros(seq_len, np.uint8),
            seq_lens=np.zeros(0, np.int32),
            spans=no_spans,
            block_table=masks.block_table(doc_start, kv_end),
            conversation_ids=[],
            loss_weight=np.zeros(seq_len, np.float32) if dataset.shards.weighted else None,
        ),
    )
