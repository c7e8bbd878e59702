"""What `print` shows of a packed folder and of its rows."""

from __future__ import annotations

import pytest

from ismdata import PackedDataset
from tests.support.handmade import SEQ_LEN, PackedFolder


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    PackedFolder(tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    return PackedDataset("packed")


def test_a_dataset_is_printed_in_one_line(dataset):
    assert repr(dataset) == str(dataset)
    assert repr(dataset) == f"PackedDataset('packed': 3 sequences of {SEQ_LEN} tokens, mask ism)"


def test_a_row_is_printed_without_its_arrays(dataset):
    for row in range(3):
        sample = dataset[row]
        sequence = sample.sequence
        ids = ", ".join(map(repr, sequence.conversation_ids[:3]))
        assert repr(sequence).startswith(f"PackedSequence({len(sequence.seq_lens)} documents [{ids}")
        assert f"{sequence.seq_lens.sum()} of {SEQ_LEN} tokens, {sequence.loss_mask.sum()} targets" in repr(sequence)
        assert repr(sample) == f"Sample(mask='ism', sequence={sequence!r})"
        assert len(repr(sample)) < 300 and "\n" not in repr(sample)
