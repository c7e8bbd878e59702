"""Refusals before the first step, non-finite losses, LoRA, evaluation, and training an earlier output further."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ismdata.attention import attachment as attention
from ismdata.attention import model_folder
from ismdata.attention.models.loading import open_model
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.data.index import load_index, write_index
from ismdata.errors import DataError, UsageError
from ismdata.masks import IGNORE_INDEX
from ismdata.train import export as model_out
from ismdata.train import metrics
from ismdata.train.collate import TrainingCollator
from ismdata.train.loss import COUNTS
from ismdata.train.metrics import peak_flops, read_column, training_flops
from ismdata.train.progress import Cost
from ismdata.train.trainer_arguments import check_trackers
from tests.support.reporters import Recorder
from tests.support.tiny import VOCABULARY, tiny_model, write_packed
from tests.support.training_shards import copying_rows, curve, packed_folder, run, weights, word_tokenizer

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("data") / "packed", 8)


def test_a_model_with_another_tokenizer_is_refused(packed, tmp_path):
    """Even if it has as many tokens. The same one under another name is accepted."""
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "own")
    word_tokenizer(tmp_path / "own")
    open_model(str(tmp_path / "own"), PackedDataset(packed))
    text = (tmp_path / "own" / "tokenizer.json").read_text()
    (tmp_path / "own" / "tokenizer.json").write_text(text.replace('"w7": 7', '"x7": 7').replace('"w8": 8', '"w7": 8'))
    with pytest.raises(
        DataError,
        match=r"own: the model's tokenizer differs from the shards'.*'w7' has the id 8 in the model's and 7 in",
    ):
        run(packed, tmp_path / "out", model=str(tmp_path / "own"))
    assert not (tmp_path / "out").exists()


def test_evaluation_shards_for_another_mask_or_tokenizer_are_refused(packed, model, tmp_path):
    prefix = write_packed(tmp_path / "prefix", copying_rows(2, mask="prefix"))
    with pytest.raises(UsageError, match=r"--eval .*prefix: the shards were packed for the mask 'prefix'"):
        run(packed, tmp_path / "out", model=model, eval=str(prefix))
    other = write_packed(tmp_path / "other", copying_rows(2))
    index = load_index(other)
    index["tokenizer"]["sha256"] = "0" * 64
    write_index(other, index)
    with pytest.raises(DataError, match=r"--eval .*other: packed with another tokenizer"):
        run(packed, tmp_path / "out", model=model, eval=str(other))


def test_the_evaluation_loss_is_a_mean_over_targets(packed, model, tmp_path):
    """Five rows in batches of two: padding fills the last batch."""
    rows = copying_rows(5)
    folder = write_packed(tmp_path / "eval", rows)
    options = {"steps": 3, "eval": str(folder), "eval_every": 2, "batch_size": 2, "learning_rate": 1e-9}
    run(packed, tmp_path / "out", model=model, **options)
    batch = Collator()(rows)
    with torch.no_grad():
        output = attention.attach(tiny_model())(**batch)
    expected = float(output.loss)
    is_target = batch["labels"][:, 1:] != IGNORE_INDEX
    correct = (output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & is_target
    found = read_column(tmp_path / "out" / "metrics.csv", "eval_loss")
    assert [step for step, _ in found] == [2, 3]
    assert [loss for _, loss in found] == pytest.approx([expected] * 2, rel=1e-4)
    accuracy = read_column(tmp_path / "out" / "metrics.csv", "eval_token_accuracy")
    assert accuracy == [(step, pytest.approx(float(correct.sum() / is_target.sum()))) for step in (2, 3)]


def test_a_non_finite_loss_stops_the_run_and_saves_its_batch(packed, model, tmp_path, monkeypatch):
    def poisoned(self, samples):
        batch = original(self, samples)
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        if self.__dict__["calls"] == 4:
            batch["loss_weight"] = torch.full(batch["labels"].shape, torch.nan)
        return batch

    original = TrainingCollator.__call__
    output = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingCollator, "__call__", poisoned)
        with pytest.raises(
            DataError, match=r"the loss is nan at step 4; the weights are still those of step 3"
        ) as raised:
            run(packed, output, model=model, steps=6, save_every=3, batch_size=2)
    message = str(raised.value)
    assert "The checkpoint of step 3 is kept; the same command resumes from it" in message
    saved = load_file(tmp_path / "model-step-4-batch.safetensors")
    row = int(re.search(r"--row (\d+)", message)[1])
    assert torch.equal(saved["input_ids"][0], Collator()([PackedDataset(packed)[row]])["input_ids"][0])
    assert {"input_ids", "labels", "doc_start", "kv_end", "loss_weight"} <= saved.keys()
    assert not saved.keys() & set(COUNTS)
    run(packed, output, model=model, steps=6, save_every=3, batch_size=2)


def test_only_adapters_are_trained_and_they_are_merged(packed, model, tmp_path):
    pytest.importorskip("peft")
    output = tmp_path / "out"
    run(packed, output, model=model, lora=True, lora_rank=4, steps=4, learning_rate=1e-2, log_every=1, save_every=2)
    before, after = load_file(model + "/model.safetensors"), weights(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    losses = [float(line["loss"]) for line in curve(output)]
    assert losses[-1] < losses[0]
    merged = model_folder.load(output)
    batch = Collator()([PackedDataset(packed)[row] for row in range(8)])
    with torch.no_grad():
        assert float(merged(**batch).loss) < losses[0]


def test_an_earlier_output_is_trained_further(packed, model, tmp_path):
    run(packed, tmp_path / "first", model=model, steps=3, learning_rate=1e-2, log_every=1)
    reporter = Recorder()
    options = {"model": str(tmp_path / "first"), "mask": "causal", "log_every": 1}
    second = run(packed, tmp_path / "second", reporter=reporter, **options)
    assert reporter.notes[0].endswith("first was trained under the mask ism; this run continues under causal")
    assert second.first_loss < float(curve(tmp_path / "first")[0]["loss"])
    assert json.loads((tmp_path / "second" / "config.json").read_text())["ismdata_mask"] == "causal"


def test_gradient_checkpointing_and_bfloat16_change_little(packed, model, tmp_path):
    for name, options in {"plain": {}, "checkpointed": {"gradient_checkpointing": True}}.items():
        run(packed, tmp_path / name, model=model, steps=2, log_every=1, **options)
    assert curve(tmp_path / "plain") == curve(tmp_path / "checkpointed")
    report = run(packed, tmp_path / "bfloat16", model=model, steps=2, log_every=1, precision="bfloat16")
    assert report.dtype == "bfloat16"
    for found, expected in zip(curve(tmp_path / "bfloat16"), curve(tmp_path / "plain"), strict=True):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=0.02)


def test_the_model_card_and_the_generation_config(packed, model, tmp_path):
    run(packed, tmp_path / "out", model=model, steps=2, report_to=("tensorboard",))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Load it through ismdata" in card
    assert "| steps | 2 |" in card
    assert "steps = 2\n" in card
    assert "epochs =" not in card and "lora_rank" not in card  # options without effect
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2], 0)
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))
    assert (tmp_path / "out" / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(("warmup", "reported"), [(1, False), (2, True)])
def test_a_warm_up_as_long_as_the_run_is_reported(warmup, reported, packed, model, tmp_path):
    reporter = Recorder()
    run(packed, tmp_path / "out", model=model, steps=2, warmup=warmup, reporter=reporter)
    assert any("the warm-up of" in line for line in reporter.notes) == reported


def test_the_end_of_a_turn_ends_a_generation(packed, monkeypatch):
    dataset = PackedDataset(packed)
    monkeypatch.setattr(model_out, "_end_of_turn", lambda dataset: [7])
    trained = tiny_model()
    model_out.set_generation_ends(trained, dataset)
    assert trained.generation_config.eos_token_id == [7, 2]


def test_without_matplotlib_there_are_no_curves(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not metrics.draw_curves(tmp_path, "ism")


def test_operations_per_parameter_and_pair():
    """Per parameter of the head and target 2 forward and 4 backward; per layer, width and pair 4 and 8."""
    model = tiny_model()
    cost = Cost(model, processes=1)
    head = VOCABULARY * 32
    assert cost.sizes["head"] == head
    assert cost.sizes["frozen"] == 0
    assert cost.sizes["trained"] == model.num_parameters() - 2 * head
    assert training_flops(**cost.sizes, tokens=0, target_tokens=1, pairs=0) == 6 * head
    assert training_flops(**cost.sizes, tokens=0, target_tokens=0, pairs=1) == 12 * 2 * 32
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a card of tomorrow") is None


@pytest.mark.parametrize("name", ["nothing", "wandb"])
def test_unknown_and_missing_trackers_are_refused(monkeypatch, name):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(UsageError, match=f"--report-to {name}: "):
        check_trackers((name,))
    check_trackers(())


def test_a_full_disk_while_the_model_is_written(monkeypatch, tmp_path):
    """safetensors' own error becomes an OSError, which the output folder reports."""

    def full(*args, **named):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", full)
    monkeypatch.setattr(model_out, "set_generation_ends", lambda *args: None)
    with pytest.raises(OSError, match="No space left"):
        model_out.save_model(model, None, tmp_path, dataset=None, tokenizer_files=[], base="m")
