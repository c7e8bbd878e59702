"""Training on two processes (gloo, on CPU) gives the results of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ismdata.attention.attachment import attach
from ismdata.data.dataset import PackedDataset
from ismdata.errors import UsageError
from ismdata.train.collate import TrainingCollator
from ismdata.train.loss import COUNTS, LOSS_ITEMS, take_counts
from ismdata.train.options import TrainOptions
from ismdata.train.trainer_arguments import training_arguments
from tests.support.distributed_worker import COMMON, RUNS
from tests.support.paths import ROOT
from tests.support.reporters import Recorder
from tests.support.tiny import sample, tiny_model, write_packed
from tests.support.training_shards import copying_rows, curve, run, weights, word_tokenizer
from tests.train.test_loss import DOCUMENTS

pytestmark = pytest.mark.slow  # trains in two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all that two processes did, started by torchrun."""
    folder = tmp_path_factory.mktemp("two")
    # Rows with very different numbers of targets, so that a mean of means would be a different loss.
    rows = [sample(DOCUMENTS[number : number + 1], seed=number) for number in range(len(DOCUMENTS))]
    rows = [row for pair in zip(rows, copying_rows(len(rows)), strict=True) for row in pair][:13]
    word_tokenizer(write_packed(folder / "packed", rows) / "tokenizer")
    tiny_model(dtype=torch.float32).save_pretrained(folder / "model")
    (folder / "in use").mkdir()
    (folder / "in use" / "notes.txt").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(ROOT / "tests" / "support" / "distributed_worker.py")
    result = subprocess.run([*torchrun, script, str(folder)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, two, tmp_path):
    """Padding fills half of the last step."""
    options = RUNS[name] | ({"batch_size": 8} if name == "one micro-batch" else {})
    run(two / "packed", tmp_path / "one", model=str(two / "model"), **COMMON, **options)
    found, expected = curve(two / "two" / name), curve(tmp_path / "one")
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)
        assert [one[column] for column in ("step", "learning_rate", "tokens", "target_tokens")] == [
            other[column] for column in ("step", "learning_rate", "tokens", "target_tokens")
        ]
    assert found[0]["token_accuracy"] == expected[0]["token_accuracy"]
    left, right = weights(two / "two" / name), weights(tmp_path / "one")
    for key in right:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-4)


def test_only_the_first_process_reports(two):
    first, second = (json.loads((two / f"notes-{rank}.json").read_text()) for rank in range(2))
    assert second == []
    assert len([line for line in first if line.startswith("step ")]) == 3 * len(RUNS)


def test_both_raise_the_error_of_one(two):
    first, second = ((two / f"refused-{rank}").read_text() for rank in range(2))
    assert first == second
    assert "in use: is in use" in first
    assert [path.name for path in (two / "in use").iterdir()] == ["notes.txt"]


def test_two_stop_together_and_one_resumes(two):
    assert (two / "stopped-0").exists()
    assert (two / "stopped-1").exists()
    assert not (two / "stopped").exists()
    reporter = Recorder()
    run(
        two / "packed",
        two / "stopped",
        model=str(two / "model"),
        reporter=reporter,
        **COMMON,
        batch_size=1,
        global_batch=8,
    )
    assert reporter.notes[1] == "resuming after step 2 of 3"
    found, expected = curve(two / "stopped"), curve(two / "two" / "four micro-batches")
    assert found[:2] == expected[:2]
    assert float(found[2]["loss"]) == pytest.approx(float(expected[2]["loss"]), rel=1e-5)
    assert found[2]["tokens"] == expected[2]["tokens"]


def test_sharded_over_two_processes_the_gradients_are_those_of_one(two):
    """torch's FSDP2 around an attached model, on CPU; accelerate supports it on GPUs only."""
    found = torch.load(two / "fsdp.pt", weights_only=True)
    dataset = PackedDataset(two / "packed")
    batch = TrainingCollator("ism", "answer")([dataset[row] for row in range(4)])
    items = take_counts(batch)[COUNTS.index(LOSS_ITEMS)]
    model = attach(tiny_model(dtype=torch.float32))
    loss = model(**batch, num_items_in_batch=items).loss
    loss.backward()
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=0, atol=1e-5)


def test_fsdp_without_a_gpu_is_refused(two, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="--fsdp requires GPUs"):
        run(two / "packed", tmp_path / "out", model=str(two / "model"), fsdp=True)


def test_fsdp_reaches_the_trainer(monkeypatch, tmp_path):
    """Without a GPU only the configuration can be checked: version 2, with the values of the file."""
    options = TrainOptions(model="tiny", fsdp=True, fsdp_config={"reshard_after_forward": False})
    arguments = training_arguments(options, tmp_path, steps=1, accumulation=1, precision="float32")
    assert arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.fsdp_plugin_args["reshard_after_forward"] is False


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP2 under accelerate needs two GPUs")
def test_fsdp_on_gpus(two, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, extra in (("ddp", []), ("fsdp", ["--fsdp"])):
        words = ["train", str(two / "packed"), "--model", str(two / "model"), "-o", str(tmp_path / name)]
        words += ["--steps", "3", "--batch-size", "2", "--log-every", "1", "--precision", "float32", *extra]
        subprocess.run([*torchrun, "-m", "ismdata", *words], check=True)
    for found, expected in zip(curve(tmp_path / "fsdp"), curve(tmp_path / "ddp"), strict=True):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3)
