"""An interrupted run resumes from its last good checkpoint to the same metrics and weights, or says why not."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch

from ismdata.errors import DataError, UsageError
from ismdata.train import trainer as trainers
from ismdata.train.checkpoints import check_checkpoint, checkpoints
from tests.support.reporters import Recorder
from tests.support.tiny import tiny_model, write_packed
from tests.support.training_shards import (
    copying_rows,
    curve,
    packed_folder,
    run,
    weights,
    word_tokenizer,
)

pytestmark = pytest.mark.slow  # trains, and kills the run

STEPS = 6
OPTIONS = {"steps": STEPS, "batch_size": 2, "warmup": 2, "learning_rate": 3e-3, "log_every": 2, "save_every": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("data") / "packed", 7)


@pytest.fixture(scope="module")
def undisturbed(packed, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "model"
    run(packed, output, model=model, **OPTIONS)
    return output


class Crash(Exception):
    pass


@pytest.fixture
def crash_after(monkeypatch):
    """Interrupt the run right after step N, before anything of that step is saved."""

    def arm(step):
        original = trainers.StepControl.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                monkeypatch.setattr(trainers.StepControl, "on_step_end", original)
                raise Crash
            original(self, args, state, control, **kwargs)

        monkeypatch.setattr(trainers.StepControl, "on_step_end", on_step_end)

    return arm


def assert_the_same(output, undisturbed):
    assert curve(output) == curve(undisturbed)
    found, expected = weights(output), weights(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def partial_of(output):
    return output.parent / f".{output.name}.partial"


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_crash_at_any_step_changes_nothing(step, packed, model, undisturbed, tmp_path, crash_after):
    output, reporter = tmp_path / "model", Recorder()
    crash_after(step)
    with pytest.raises(Crash):
        run(packed, output, model=model, **OPTIONS)
    assert not output.exists()
    assert partial_of(output).exists() == (step > 2)  # nothing to resume from before the first checkpoint
    run(packed, output, model=model, **OPTIONS, reporter=reporter)
    assert_the_same(output, undisturbed)
    reached = {1: None, 3: 2, 6: 4}[step]
    assert (reporter.notes[1] == f"resuming after step {reached} of {STEPS}") == (reached is not None)


def test_other_micro_batches_resume_too(packed, model, undisturbed, tmp_path, crash_after):
    output = tmp_path / "model"
    crash_after(3)
    with pytest.raises(Crash):
        run(packed, output, model=model, **OPTIONS)
    run(packed, output, model=model, **(OPTIONS | {"batch_size": 1, "global_batch": 2, "save_every": 3}))
    for found, expected in zip(curve(output), curve(undisturbed), strict=True):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
        assert found["tokens"] == expected["tokens"]
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3", "checkpoint-6"]


def interrupted_run(packed, model, output, crash_after, **changes):
    """Interrupt a run at step 5, with checkpoints of steps 2 and 4."""
    crash_after(5)
    with pytest.raises(Crash):
        run(packed, output, model=model, **(OPTIONS | changes))


DAMAGES = {
    "no seal: killed inside the checkpoint": lambda folder: (folder / "index.json").unlink(),
    "half a seal": lambda folder: (folder / "index.json").write_bytes((folder / "index.json").read_bytes()[:50]),
    "a file cut short": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "a file gone": lambda folder: (folder / "progress.json").unlink(),
    "a bit flipped": lambda folder: (folder / "model.safetensors").write_bytes(
        bytes([*(data := (folder / "model.safetensors").read_bytes())[:-1], data[-1] ^ 1])
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_detected(damage, undisturbed, tmp_path):
    whole = checkpoints(undisturbed)[-1]
    check_checkpoint(whole)
    broken = tmp_path / whole.name
    shutil.copytree(whole, broken)
    DAMAGES[damage](broken)
    with pytest.raises(DataError, match=r"checkpoint-6"):
        check_checkpoint(broken)


def test_after_a_damaged_checkpoint_the_one_before_is_used(packed, model, undisturbed, tmp_path, crash_after):
    output, reporter = tmp_path / "model", Recorder()
    interrupted_run(packed, model, output, crash_after)
    DAMAGES["a file cut short"](partial_of(output) / "checkpoints" / "checkpoint-4")
    run(packed, output, model=model, **OPTIONS, reporter=reporter)
    assert reporter.notes[1].startswith("skipped a checkpoint:")
    assert reporter.notes[2] == f"resuming after step 2 of {STEPS}"
    assert_the_same(output, undisturbed)


def test_without_a_good_checkpoint_the_run_starts_again(packed, model, undisturbed, tmp_path, crash_after):
    output, reporter = tmp_path / "model", Recorder()
    interrupted_run(packed, model, output, crash_after)
    for folder in checkpoints(partial_of(output)):
        (folder / "index.json").unlink()
    run(packed, output, model=model, **OPTIONS, reporter=reporter)
    assert [line.split()[0] for line in reporter.notes[1:5]] == ["skipped", "skipped", "loss", "step"]
    assert_the_same(output, undisturbed)


CHANGES = {
    "the seed": ({"seed": 1}, "--seed is 1 and was 0"),
    "the learning rate": ({"learning_rate": 1e-3}, r"--learning-rate is 0.001 and was 0.003"),
    "the schedule": ({"schedule": "linear"}, "--schedule is linear and was cosine"),
    "the warm-up": ({"warmup": 0}, "--warmup is 0 and was 2"),
    "the steps": ({"steps": 8}, r"the number of sequences \(--steps, --epochs\) is 16 and was 12"),
    "the global batch": ({"batch_size": 4, "steps": 3}, "--global-batch is 4 and was 2"),
    "the mask": ({"mask": "causal"}, "--mask is causal and was ism"),
    "the weighting": ({"loss_weighting": "answer"}, "--loss-weighting is answer and was token"),
    "the precision": ({"precision": "bfloat16"}, "--precision is bfloat16 and was float32"),
}


def test_another_run_is_refused_with_the_reason(packed, model, undisturbed, tmp_path, crash_after):
    output = tmp_path / "model"
    interrupted_run(packed, model, output, crash_after)
    before = sorted(path for path in partial_of(output).rglob("*"))
    for changes, reason in CHANGES.values():
        with pytest.raises(UsageError, match=rf"\.model\.partial: .*after step 4 differs from this one: .*{reason}"):
            run(packed, output, model=model, **(OPTIONS | changes))
    changed = write_packed(tmp_path / "changed", copying_rows(8)[1:])
    word_tokenizer(changed / "tokenizer")
    with pytest.raises(DataError, match="the shards of PACKED have changed"):
        run(changed, output, model=model, **OPTIONS)
    tiny_model(dtype=torch.float32, seed=1).save_pretrained(tmp_path / "another")
    with pytest.raises(DataError, match="the model that it starts from has changed"):
        run(packed, output, model=str(tmp_path / "another"), **OPTIONS)
    assert sorted(path for path in partial_of(output).rglob("*")) == before
    run(packed, output, model=model, **OPTIONS)
    assert_the_same(output, undisturbed)


def test_overwrite_resumes_the_same_run_and_replaces_another(packed, model, undisturbed, tmp_path, crash_after):
    output, reporter = tmp_path / "model", Recorder()
    run(packed, output, model=model, **(OPTIONS | {"steps": 1}))
    crash_after(5)
    with pytest.raises(Crash):
        run(packed, output, model=model, overwrite=True, **OPTIONS)
    assert len(curve(output)) == 1  # the older output stays until the new one is complete
    run(packed, output, model=model, overwrite=True, **OPTIONS, reporter=reporter)
    assert reporter.notes[1] == f"resuming after step 4 of {STEPS}"
    assert_the_same(output, undisturbed)
    crash_after(5)
    with pytest.raises(Crash):
        run(packed, output, model=model, overwrite=True, **(OPTIONS | {"seed": 1}))
    reporter.notes.clear()
    run(packed, output, model=model, overwrite=True, **OPTIONS, reporter=reporter)
    assert reporter.notes[1].startswith("starting over, since --overwrite was given:")
    assert_the_same(output, undisturbed)


def test_checkpoints_without_a_record_are_refused(packed, model, tmp_path, crash_after):
    output = tmp_path / "model"
    interrupted_run(packed, model, output, crash_after)
    (partial_of(output) / "run.json").unlink()
    with pytest.raises(UsageError, match=r"has checkpoints but no run\.json"):
        run(packed, output, model=model, **OPTIONS)
    run(packed, output, model=model, overwrite=True, **(OPTIONS | {"steps": 1}))


@pytest.mark.parametrize("fault", ["safetensors", "seal"])
def test_a_full_disk_leaves_the_last_good_checkpoint(fault, packed, model, undisturbed, tmp_path, monkeypatch):
    """Writing fails at the second checkpoint, with each library's own error."""
    from safetensors import SafetensorError

    output = tmp_path / "model"
    full = "No space left on device"
    faults = {
        "safetensors": ("save_model", SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)")),
        "seal": ("_seal", OSError(28, full)),
    }
    name, error = faults[fault]
    original = getattr(trainers.PackedTrainer, name)

    def fails_later(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise error
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.PackedTrainer, name, fails_later)
        with pytest.raises(
            DataError,
            match=r"checkpoint-4: the checkpoint could not be written .*Free some space. The checkpo"
            r"int of step 2 is kept; the same command resumes from it",
        ):
            run(packed, output, model=model, **OPTIONS)
    (kept,) = checkpoints(partial_of(output))
    check_checkpoint(kept)
    run(packed, output, model=model, **OPTIONS)
    assert_the_same(output, undisturbed)


def test_a_disk_that_is_really_full(packed, model, undisturbed, tmp_path):
    """A limit on file sizes that the model's file fits and the optimizer's exceeds."""
    import resource

    output = tmp_path / "model"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (undisturbed / "model.safetensors").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, limits[1]))
        with pytest.raises(DataError, match="checkpoint-2: the checkpoint could not be written"):
            run(packed, output, model=model, **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    run(packed, output, model=model, **OPTIONS)
    assert_the_same(output, undisturbed)


def test_what_the_result_depends_on_is_recorded(undisturbed):
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["global_batch"] == 2
    assert record["sequences"] == 12
    assert {"data", "weights", "mask", "seed", "learning_rate"} <= record.keys()
