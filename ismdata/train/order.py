"""The order in which a run sees its sequences: a seeded permutation for each pass, laid end to end.

The order depends on the number of sequences and the seed alone. How a step is cut into micro-batches and processes does
not enter it, so a run goes on with the same sequences after a crash, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from ismdata import masks
from ismdata.data import PackedDataset, Sample, shards

#: Stands for no sequence: what fills the last step, where the passes asked for end inside it.
NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which sequences each step sees.

    sequences: how many there are. total: how many are seen in all, over all passes. global_batch: sequences of a step,
    over all its micro-batches and processes.
    """

    sequences: int
    total: int
    global_batch: int
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.total / self.global_batch)

    def permutation(self, number: int) -> NDArray[np.int64]:
        """The sequences in the order of pass `number`, int64[sequences]."""
        return np.random.default_rng((self.seed, number)).permutation(self.sequences)

    def step(self, number: int) -> list[int]:
        """The sequences of step `number`, counted from 0, with NOTHING where they are fewer than `global_batch`.

        >>> order = Order(sequences=3, total=5, global_batch=2, seed=0)
        >>> [order.step(number) for number in range(order.steps)]
        [[2, 0], [1, 2], [0, -1]]
        """
        first = number * self.global_batch
        return list(self._between(first, first + self.global_batch))

    def _between(self, first: int, last: int) -> Iterator[int]:
        passes: dict[int, list[int]] = {}
        for place in range(first, last):
            number, at = divmod(place, self.sequences)
            if number not in passes:
                passes = {number: self.permutation(number).tolist()}
            yield passes[number][at] if place < self.total else NOTHING

    def __iter__(self) -> Iterator[int]:
        return self._between(0, self.steps * self.global_batch)


class OrderSampler(Sampler[int]):
    """An Order as a sampler: all steps of the run, one after the other, each full."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __len__(self) -> int:
        return self.order.steps * self.order.global_batch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class OrderedDataset(Dataset[Sample]):
    """A packed dataset in which row NOTHING is a sequence of padding, without documents and targets."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Sample:
        return padding_sample(self.dataset) if row == NOTHING else self.dataset[row]


def padding_sample(dataset: PackedDataset) -> Sample:
    """A sequence of padding alone, as wide as those of `dataset`."""
    seq_len = dataset.seq_len
    nothing = np.zeros((0, 4), np.int32)
    doc_start, kv_end = masks.intervals([], nothing, seq_len=seq_len, mask=dataset.mask)
    return Sample(
        mask=dataset.mask,
        sequence=shards.PackedSequence(
            input_ids=np.full(seq_len, dataset.shards.index["tokenizer"].get("pad_id") or 0, np.int32),
            position_ids=np.zeros(seq_len, np.int32),
            position_ids_2=np.zeros(seq_len, np.int32) if dataset.layout == "glm" else None,
            loss_mask=np.zeros(seq_len, np.uint8),
            seq_lens=np.zeros(0, np.int32),
            spans=nothing,
            block_table=masks.block_table(doc_start, kv_end),
            conversation_ids=[],
            loss_weight=np.zeros(seq_len, np.float32) if dataset.shards.weighted else None,
        ),
    )
