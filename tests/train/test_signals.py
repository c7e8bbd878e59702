"""SIGTERM and Ctrl-C: a run stops after its step, leaves an evaluation, and resumes to the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ismdata.errors import Terminated
from ismdata.train import stop_signals
from ismdata.train import trainer as trainers
from ismdata.train.checkpoints import checkpoints
from ismdata.train.stop_signals import StopSignals
from tests.support.reporters import Recorder
from tests.support.training_shards import curve, packed_folder, run, weights

STEPS = 6
OPTIONS = {"steps": STEPS, "batch_size": 2, "warmup": 2, "learning_rate": 3e-3, "log_every": 2, "save_every": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("data") / "packed", 7)


@pytest.fixture(scope="module")
def evaluated(packed, model, tmp_path_factory):
    """A run that no signal disturbs, with an evaluation after steps 3 and 6."""
    output = tmp_path_factory.mktemp("undisturbed") / "model"
    run(packed, output, model=model, **OPTIONS, eval=str(packed), eval_every=3)
    return output


def partial_of(output):
    return output.parent / f".{output.name}.partial"


def kill_in(monkeypatch, name, step, number, *, times=1):
    """Send this process a signal at the start of a method of the trainer, after `step` full steps."""
    original = getattr(trainers.PackedTrainer, name)
    left = [times]

    def method(self, *args, **options):
        if self.state.global_step == step and left[0]:
            left[0] -= 1
            signal.raise_signal(number)
        return original(self, *args, **options)

    monkeypatch.setattr(trainers.PackedTrainer, name, method)


def told(reporter):
    """The line about the signal, which a thread reports."""
    for _ in range(100):
        found = [line for line in reporter.notes if line.startswith(("Ctrl-C", "SIGTERM"))]
        if found:
            return found
        time.sleep(0.01)
    return []


def assert_resumes(packed, output, model, undisturbed, step):
    reporter = Recorder()
    run(packed, output, model=model, **OPTIONS, eval=str(packed), eval_every=3, reporter=reporter)
    assert f"resuming after step {step} of {STEPS}" in reporter.notes
    assert curve(output) == curve(undisturbed)
    found, expected = weights(output), weights(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize(
    ("where", "after", "stops", "doing"),
    [
        ("compute_loss", 4, 5, "finishing this step"),
        ("compute_loss", 2, 3, "finishing this step"),  # an evaluation is due then: the resumed run does it
        ("compute_loss", 5, 6, "finishing this step"),  # the last step
        ("_count_correct", 3, 3, "leaving the evaluation"),
        ("_count_correct", 6, 6, "leaving the evaluation"),
        ("_write", 4, 4, "finishing the checkpoint"),
    ],
)
def test_a_signal_ends_a_run_where_it_can_resume(
    where, after, stops, doing, number, packed, model, evaluated, tmp_path, monkeypatch
):
    output = tmp_path / "model"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    reporter = Recorder()
    with monkeypatch.context() as patched:
        kill_in(patched, where, after, number)
        with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt) as raised:
            run(packed, output, model=model, **OPTIONS, eval=str(packed), eval_every=3, reporter=reporter)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    if number == signal.SIGTERM:
        assert raised.value.kept == partial_of(output)
        assert told(reporter) == [f"SIGTERM: {doing}, then stopping"]
    else:
        text = f"interrupted after step {stops}; run the same command again to resume from there"
        assert str(raised.value) == text
        assert told(reporter) == [f"Ctrl-C: {doing}, press again to stop now"]
    assert checkpoints(partial_of(output))[-1].name == f"checkpoint-{stops}"
    assert_resumes(packed, output, model, evaluated, stops)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_in_the_middle_of_a_step(packed, model, evaluated, tmp_path, monkeypatch):
    output = tmp_path / "model"
    with monkeypatch.context() as patched:
        kill_in(patched, "compute_loss", 4, signal.SIGINT)
        kill_in(patched, "_get_grad_norm", 4, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as raised:
            run(packed, output, model=model, **OPTIONS, eval=str(packed), eval_every=3)
    expected = "interrupted. The checkpoint of step 4 is kept; the same command resumes from it"
    assert str(raised.value) == expected
    assert_resumes(packed, output, model, evaluated, 4)


@pytest.mark.slow
def test_a_second_ctrl_c_before_the_first_checkpoint_keeps_nothing(packed, model, tmp_path, monkeypatch):
    kill_in(monkeypatch, "compute_loss", 0, signal.SIGINT)
    kill_in(monkeypatch, "_get_grad_norm", 0, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(packed, tmp_path / "model", model=model, **OPTIONS)
    assert str(raised.value) == "interrupted. There was no checkpoint yet, so nothing is kept"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_signal_in_the_evaluation_of_a_resumed_run_keeps_its_checkpoint(
    packed, model, evaluated, tmp_path, monkeypatch
):
    output = tmp_path / "model"
    for _ in range(2):
        with monkeypatch.context() as patched:
            kill_in(patched, "_count_correct", 6, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt, match="interrupted after step 6"):
                run(packed, output, model=model, **OPTIONS, eval=str(packed), eval_every=3)
        assert checkpoints(partial_of(output))[-1].name == "checkpoint-6"
    assert_resumes(packed, output, model, evaluated, 6)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_its_exit_code_and_says_how_to_resume(workers, number, code, packed, model, tmp_path):
    """A terminal sends Ctrl-C to the data loading processes too."""
    command = [sys.executable, "-m", "ismdata", "train", str(packed), "--model", model, "-o", str(tmp_path / "model")]
    command += ["--steps", "100000", "--batch-size", "2", "--log-every", "1", "--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if line.startswith("step 2/"):
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait() == code
    signalled = [line for line in lines if line.startswith(("Ctrl-C", "SIGTERM"))]
    assert len(signalled) == 1
    assert "run the same command again to resume" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert checkpoints(partial_of(tmp_path / "model"))


def test_without_another_process_to_wait_for_the_line_offers_a_second_ctrl_c():
    for alone, ending in [(True, ", press again to stop now"), (False, ", then stopping")]:
        reporter = Recorder()
        stop = StopSignals(alone=alone, reporter=reporter)
        with stop.deferred(), stop.during(stop_signals.EVALUATION):
            signal.raise_signal(signal.SIGINT)
            assert told(reporter) == [f"Ctrl-C: leaving the evaluation{ending}"]
            if not alone:
                signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT


def test_outside_the_main_thread_signals_are_left_alone():
    handler = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopSignals(alone=True, reporter=Recorder()).deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
