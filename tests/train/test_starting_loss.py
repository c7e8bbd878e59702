"""The loss before the first step: what it says, and that it is the loss of the first micro-batch under each mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ismdata.attention.attachment import attach
from ismdata.attention.models.loading import pretrained
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.train import TrainOptions, TrainReport, train
from tests.support.reporters import Recorder
from tests.support.tiny import write_packed
from tests.support.training_shards import copying_rows, word_tokenizer

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = write_packed(tmp_path_factory.mktemp("shards") / "packed", copying_rows(6))
    word_tokenizer(folder / "tokenizer")
    return folder


def run(packed: Path, output: Path, **fields: Any) -> tuple[TrainReport, list[str]]:
    recorder = Recorder()
    options = TrainOptions(steps=1, batch_size=2, warmup=0, **fields)
    report = train(packed, output=output, options=options, reporter=recorder)
    return report, [note for note in recorder.notes if "before training" in note or "does not know" in note]


def dense_loss(model: str, packed: Path, mask: str, count: int) -> float:
    """The mean loss per target of the first sequences, from the logits of all tokens."""
    network = attach(pretrained(model), "sdpa").eval()
    dataset = PackedDataset(packed)
    batch = Collator(mask)([dataset[at] for at in range(count)])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = network(**batch).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_it_is_the_loss_of_the_first_batch_under_both_masks(packed: Path, model: str, tmp_path: Path) -> None:
    report, notes = run(packed, tmp_path / "out", model=model)
    assert report.starting_losses.keys() == {"causal", "ism"}
    for mask, found in report.starting_losses.items():
        assert found == pytest.approx(dense_loss(model, packed, mask, 2), abs=1e-5)
    assert notes[0].startswith(f"loss before training: causal {report.starting_losses['causal']:.3f}, perplexity ")
    assert f" · ism {report.starting_losses['ism']:.3f}, perplexity " in notes[0]
    assert "loss before training, causal" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_mask_that_the_model_does_not_know_is_explained(
    packed: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worse, explained in ((-10.0, True), (10.0, False)):
        monkeypatch.setattr("ismdata.train.starting_loss._WORSE", worse)
        _, notes = run(packed, tmp_path / str(worse), model=model)
        assert ("does not know the mask ism yet" in notes[-1]) == explained


def test_it_is_measured_on_the_evaluation_set_if_there_is_one(packed: Path, model: str, tmp_path: Path) -> None:
    other = write_packed(tmp_path / "other", copying_rows(1))
    word_tokenizer(other / "tokenizer")
    report, _ = run(packed, tmp_path / "out", model=model, eval=str(other))
    assert report.starting_losses["ism"] == pytest.approx(dense_loss(model, other, "ism", 1), abs=1e-5)


def test_the_causal_mask_needs_one_figure(packed: Path, model: str, tmp_path: Path) -> None:
    report, notes = run(packed, tmp_path / "out", model=model, mask="causal")
    assert report.starting_losses.keys() == {"causal"}
    assert len(notes) == 1


def test_a_preset_has_none(packed: Path, tmp_path: Path) -> None:
    report, notes = run(packed, tmp_path / "out", model="tiny")
    assert (report.starting_losses, notes) == ({}, [])


def test_it_changes_nothing(packed: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of a run without it."""
    run(packed, tmp_path / "with", model=model)
    monkeypatch.setattr("ismdata.train.pipeline.report_starting_loss", lambda *arguments, **options: {})
    run(packed, tmp_path / "without", model=model)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert ours == theirs
