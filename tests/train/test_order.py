"""The order of sequences: what each step sees depends on the seed only, not on micro-batches or processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.masks import IGNORE_INDEX
from ismdata.train.order import PADDING_ROW, Order, OrderedDataset, PaddedDataset
from tests.support.tiny import ANSWER, QUERY, sample, write_packed


@given(st.integers(1, 30), st.integers(1, 100), st.integers(1, 12), st.integers(0, 3))
def test_every_pass_sees_every_sequence_once(sequences, total, global_batch, seed):
    order = Order(sequences=sequences, total=total, global_batch=global_batch, seed=seed)
    seen = [row for step in range(order.steps) for row in order.step(step)]
    assert seen == list(order) == [order[place] for place in range(len(order))]
    assert len(seen) == len(order) == order.steps * global_batch
    assert seen[total:] == [PADDING_ROW] * (len(seen) - total)
    assert len(seen) - total < global_batch
    for first in range(0, total - sequences + 1, sequences):
        assert sorted(seen[first : first + sequences]) == list(range(sequences))
    assert len(set(seen[:total])) == min(sequences, total)


def test_passes_and_seeds_differ():
    order = Order(sequences=50, total=100, global_batch=10, seed=0)
    assert order.permutation(0).tolist() != order.permutation(1).tolist()
    assert order.permutation(0).tolist() != Order(sequences=50, total=100, global_batch=10, seed=1).step(0)


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation"), [(1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1), (4, 2, 1), (8, 1, 1)]
)
def test_a_step_is_the_same_on_any_number_of_processes(processes, batch, accumulation):
    """As accelerate distributes batches over processes."""
    order = Order(sequences=21, total=50, global_batch=8, seed=3)
    dealt = []
    for rank in range(processes):
        sampler = BatchSampler(order, batch, drop_last=False)
        dealt.append(list(BatchSamplerShard(sampler, num_processes=processes, process_index=rank)))
    for step in range(order.steps):
        mine = slice(step * accumulation, (step + 1) * accumulation)
        rows = [row for batches in dealt for micro in batches[mine] for row in micro]
        assert sorted(rows) == sorted(order.step(step))


@pytest.mark.parametrize("weighted", [False, True])
def test_padding_fills_the_last_step_and_the_last_evaluation_batch(tmp_path, weighted):
    weights = np.ones(128, np.float32) if weighted else None
    folder = write_packed(tmp_path / "packed", [sample([[(QUERY, 3), (ANSWER, 4)]], loss_weight=weights)])
    one = PackedDataset(folder)
    ordered = OrderedDataset(one, Order(sequences=1, total=1, global_batch=2, seed=0))
    assert len(one) == 1
    for dataset in (ordered, PaddedDataset(one, 2)):
        assert len(dataset) == 2
        check_padding(Collator()([dataset[0], dataset[1]]), weighted)
    assert len(PaddedDataset(one, 1)) == 1


def check_padding(batch, weighted):
    assert (batch["labels"][1] == IGNORE_INDEX).all()
    assert torch.equal(batch["kv_end"][1] - batch["doc_start"][1], torch.ones(128, dtype=torch.int32))
    assert ("loss_weight" in batch) == weighted
