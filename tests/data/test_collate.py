"""The Collator's tensors against the stored vectors and a token-by-token oracle; the dataset, in workers too."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ismdata import masks
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.data.index import write_index
from ismdata.errors import DataError, UsageError
from ismdata.masks import IGNORE_INDEX, varlen_tables
from tests.support.paths import SHARED
from tests.support.tiny import ANSWER, PROMPT, QUERY, sample, write_packed

GOLDEN = SHARED / "golden" / "masks.json"
KINDS = {"prompt": PROMPT, "query": QUERY, "answer": ANSWER}
DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "doc_start": torch.int32,
    "kv_end": torch.int32,
    "block_table": torch.int16,
}


def golden_cases():
    if not GOLDEN.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"the golden vectors are not here: {GOLDEN}"))]
    return [pytest.param(case, id=f"{case['name']}-{case['mask']}") for case in json.loads(GOLDEN.read_text())]


@pytest.mark.parametrize("case", golden_cases())
def test_golden(case):
    seq_len, block_size = case["seq_len"], case["block_size"]
    documents = [
        [(KINDS[span["kind"]], span["end"] - span["start"], span["train"]) for span in document]
        for document in case["documents"]
    ]
    whole_blocks = seq_len % block_size == 0
    row = sample(documents, seq_len=seq_len, mask=case["mask"], block_size=block_size if whole_blocks else seq_len)
    batch = Collator()([row, row])  # twice: the second row's offsets must not count from the first
    assert {name: tensor.dtype for name, tensor in batch.items()} == DTYPES
    for each in range(2):
        assert batch["doc_start"][each].tolist() == case["doc_start"]
        assert batch["kv_end"][each].tolist() == case["kv_end"]
        assert batch["position_ids"][each].tolist() == case["position_ids"]
        labels, tokens = batch["labels"][each], batch["input_ids"][each]
        assert (labels != IGNORE_INDEX).int().tolist() == case["loss_mask"]
        assert torch.equal(labels[labels != IGNORE_INDEX], tokens[labels != IGNORE_INDEX])
        if whole_blocks:
            for (any_lo, any_hi, full_lo, full_hi), expected in zip(
                batch["block_table"][each].tolist(), case["blocks"], strict=True
            ):
                assert list(range(any_lo, any_hi)) == expected["any"]
                assert list(range(full_lo, full_hi)) == expected["full"]


def rows_of(mask):
    return st.lists(
        st.tuples(
            st.lists(
                st.lists(
                    st.tuples(st.sampled_from([PROMPT, QUERY, ANSWER]), st.integers(1, 9)), min_size=1, max_size=5
                ),
                min_size=1,
                max_size=4,
            ),
            st.integers(0, 2**16),
        ).map(lambda made: sample(made[0], seq_len=256, mask=mask, seed=made[1])),
        min_size=1,
        max_size=4,
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data(), mask=st.sampled_from(masks.MASKS), wanted=st.sampled_from(["ism", "causal"]))
def test_a_batch_is_its_rows(data, mask, wanted):
    """Collating a batch equals the one-row functions of `masks`, row by row, for every mask that the spans allow."""
    samples = data.draw(rows_of(mask))
    wanted = "prefix" if mask == "prefix" else wanted
    batch = Collator(wanted)(samples)
    for each, row in enumerate(made.sequence for made in samples):
        doc_start, kv_end = masks.intervals(row.seq_lens, row.spans, seq_len=256, mask=wanted)
        assert batch["doc_start"][each].tolist() == doc_start.tolist()
        assert batch["kv_end"][each].tolist() == kv_end.tolist()
        assert batch["block_table"][each].tolist() == masks.block_table(doc_start, kv_end).tolist()
        is_target = masks.targets(row.seq_lens, row.spans, seq_len=256, mask=wanted).astype(bool)
        assert batch["labels"][each].tolist() == np.where(is_target, row.input_ids, IGNORE_INDEX).tolist()
        assert batch["input_ids"][each].tolist() == row.input_ids.tolist()
        # No leak: the token that predicts a target does not see it.
        target = np.flatnonzero(is_target)
        assert (kv_end[target - 1] <= target).all()


DOCUMENT = [(PROMPT, 2), (QUERY, 3), (ANSWER, 4), (QUERY, 2), (ANSWER, 3)]


def test_a_batch_has_loss_weights_only_if_the_shards_have_them():
    weight = np.linspace(0, 1, 128, dtype=np.float32)
    batch = Collator()([sample([DOCUMENT], loss_weight=weight)])
    assert batch["loss_weight"].dtype == torch.float32
    assert batch["loss_weight"][0].tolist() == weight.tolist()
    assert "loss_weight" not in Collator()([sample([DOCUMENT])])


@pytest.mark.parametrize("mask", masks.MASKS)
def test_a_batch_has_tables_only_if_they_are_requested(mask):
    """They are computed from the intervals of the batch, over all its samples."""
    samples = [sample([DOCUMENT] * n, mask=mask) for n in (1, 3)]
    batch = Collator(tables=True)(samples)
    expected = varlen_tables.tables(batch["doc_start"].numpy(), batch["kv_end"].numpy()).as_batch()
    assert batch.keys() - Collator()(samples).keys() == set(varlen_tables.NAMES)
    for name, array in expected.items():
        assert batch[name].shape == array.shape
        assert np.array_equal(batch[name].numpy(), array), name


@pytest.mark.parametrize(("packed", "wanted"), [("ism", "prefix"), ("causal", "prefix"), ("prefix", "ism")])
def test_prefix_needs_its_own_packing(packed, wanted):
    with pytest.raises(UsageError, match=f"packed for the mask '{packed}'.*--mask {wanted}"):
        Collator(wanted)([sample([DOCUMENT], mask=packed)])


@pytest.mark.parametrize(("packed", "wanted"), [("ism", "causal"), ("causal", "ism")])
def test_another_mask_has_another_block_table(packed, wanted):
    """A context block over several blocks: the stored table would be wrong, too wide or too narrow."""
    documents = [[(QUERY, 300), (ANSWER, 50)], DOCUMENT]
    tables = {
        mask: Collator(wanted_mask)([sample(documents, seq_len=512, mask=mask)])["block_table"]
        for mask, wanted_mask in ((packed, wanted), (wanted, None))
    }
    assert torch.equal(tables[packed], tables[wanted])
    assert not torch.equal(tables[packed], Collator()([sample(documents, seq_len=512, mask=packed)])["block_table"])


def test_refused_calls():
    with pytest.raises(UsageError, match="expected one of ism, causal, prefix"):
        Collator("full")
    with pytest.raises(UsageError, match="causal, ism; expected one mask"):
        Collator()([sample([DOCUMENT]), sample([DOCUMENT], mask="causal")])
    with pytest.raises(UsageError, match="no sample"):
        Collator()([])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    samples = [sample([DOCUMENT] * (1 + seed % 3), seed=seed) for seed in range(8)]
    return write_packed(tmp_path_factory.mktemp("packed") / "shards", samples), samples


def test_the_dataset_reads_what_was_written(packed):
    folder, samples = packed
    dataset = PackedDataset(folder)
    assert (len(dataset), dataset.mask, dataset.seq_len) == (8, "ism", 128)
    for row, expected in enumerate(samples):
        for name in ("input_ids", "position_ids", "loss_mask", "seq_lens", "spans", "block_table"):
            assert np.array_equal(getattr(dataset[row].sequence, name), getattr(expected.sequence, name)), name
        assert dataset[row].mask == "ism"
    assert dataset[-1].sequence.input_ids.tolist() == samples[-1].sequence.input_ids.tolist()
    with pytest.raises(IndexError, match="row 8"):
        dataset[8]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    rows_per_shard=st.integers(1, 5),
    rows_per_batch=st.integers(1, 5),
    weighted=st.booleans(),
)
def test_rows_are_read_from_any_shard_and_batch(tmp_path_factory, rows, rows_per_shard, rows_per_batch, weighted):
    """Several shards of several record batches each, ragged columns among them, read in any order: the rows written."""
    weight = np.linspace(0, 1, 128, dtype=np.float32) if weighted else None
    samples = [sample([DOCUMENT] * n, seed=at, loss_weight=weight) for at, n in enumerate(rows)]
    folder = tmp_path_factory.mktemp("lie") / "shards"
    write_packed(folder, samples, rows_per_shard=rows_per_shard, rows_per_batch=rows_per_batch)
    dataset = PackedDataset(folder)
    for row in [*reversed(range(len(rows))), *range(len(rows))]:
        found, expected = dataset[row].sequence, samples[row].sequence
        for name in (field.name for field in dataclasses.fields(expected)):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
            if isinstance(getattr(expected, name), np.ndarray):
                assert getattr(found, name).dtype == getattr(expected, name).dtype, name


def test_tokens_are_not_copied_before_the_batch(packed):
    """A row's arrays of T are read-only views into the memory map."""
    dataset = PackedDataset(packed[0])
    for name in ("input_ids", "position_ids", "loss_mask", "block_table"):
        first, again = (getattr(dataset[4].sequence, name) for _ in range(2))
        assert np.shares_memory(first, again), name
        assert not first.flags.writeable, name


def test_a_batch_owns_its_memory(packed):
    """Its tensors can be changed in place without changing the shards or another batch."""
    dataset = PackedDataset(packed[0])
    first = Collator()([dataset[0], dataset[1]])
    expected = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()
    again = Collator()([dataset[0], dataset[1]])
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_spans_that_do_not_tile_are_refused():
    broken = sample([DOCUMENT, DOCUMENT])
    broken.sequence.spans[2, 1] -= 1
    with pytest.raises(DataError, match="row 1: a gap between spans at token 9"):
        Collator()([sample([DOCUMENT]), broken])


def test_a_pickled_dataset_opens_its_maps_anew(packed):
    dataset = PackedDataset(packed[0])
    first = dataset[0].sequence.input_ids.tolist()
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10_000  # the files, not their content
    assert pickle.loads(pickled)[0].sequence.input_ids.tolist() == first


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_same_batches(packed, start):
    dataset = PackedDataset(packed[0])
    dataset[0]  # the map is open when the workers start
    collator = Collator("causal", tables=True)
    alone = list(DataLoader(dataset, batch_size=3, collate_fn=collator))
    loader = DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=2, multiprocessing_context=start)
    for expected, batch in zip(alone, loader, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_missing_shard_is_named(packed, tmp_path):
    with pytest.raises(DataError, match="found nothing; expected a folder that `ismdata pack` wrote"):
        PackedDataset(tmp_path / "absent")


def test_nulls_in_a_shard_are_named(packed, tmp_path):
    """The schema forbids them, but an Arrow stream can hold them."""
    folder = write_packed(tmp_path / "shards", packed[1][:1])
    path = folder / "shard-00000.arrow"
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        (batch,) = stream
    column = batch.column("input_ids")
    holed = pa.FixedSizeListArray.from_arrays(column.values, type=column.type, mask=pa.array([True]))
    columns = [holed if field.name == "input_ids" else batch.column(field.name) for field in batch.schema]
    with pa.ipc.new_stream(str(path), batch.schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    del index["sha256"]
    (folder / "index.json").unlink()
    write_index(folder, index)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: null; expected a value everywhere"):
        PackedDataset(folder)[0]
