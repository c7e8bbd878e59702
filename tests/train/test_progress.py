"""The lines of `train`: at most 80 columns, and transformers' own bars stay out of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.attention import library_bars
from ismdata.train.metrics import RunMetrics
from ismdata.train.progress import TrainProgress
from tests.support.reporters import Recorder


class Utilisation:
    """A cost with a known peak."""

    def __init__(self, share):
        self.share = share

    def utilisation(self, metrics):
        return self.share


def lines_of(tmp_path, logs, *, step, steps, share=None):
    reporter = Recorder()
    progress = TrainProgress(reporter, steps=steps, metrics=RunMetrics(tmp_path), cost=Utilisation(share))
    progress.begin(0)
    progress.advance(step)
    progress.log(logs)
    return reporter.notes


LOGS = {"loss": 2.1034, "token_accuracy": 0.512, "learning_rate": 3e-4, "tokens_per_second": 12_345.0}


def test_a_line_has_loss_accuracy_rate_speed_and_time(tmp_path):
    (line,) = lines_of(tmp_path, LOGS, step=12, steps=12)
    assert line == "step 12/12  loss 2.1034  accuracy 51.2%  lr 3.0e-04  12.3k tok/s"


@given(
    loss=st.floats(0, 1e4),
    speed=st.floats(0, 1e10),
    steps=st.integers(1, 9_999_999),
    share=st.none() | st.floats(0, 1),
)
def test_no_line_is_longer_than_80_columns(tmp_path_factory, loss, speed, steps, share):
    folder = tmp_path_factory.getbasetemp()
    logs = LOGS | {"loss": loss, "tokens_per_second": speed}
    (line,) = lines_of(folder, logs, step=max(1, steps // 2), steps=steps, share=share)
    assert len(line) <= 80
    assert "loss" in line and "accuracy" in line
    (line,) = lines_of(folder, {"eval_loss": loss, "eval_token_accuracy": 0.5}, step=steps, steps=steps)
    assert len(line) <= 80


def test_bars_of_transformers_go_to_the_reporter(capsys):
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    reporter = Recorder()
    before = gguf.tqdm
    with library_bars(reporter):
        assert list(logging.tqdm(range(2), desc="Loading weights")) == [0, 1]
        assert list(gguf.tqdm("ab", desc="Converting and de-quantizing GGUF tensors...")) == ["a", "b"]
        with logging.tqdm(total=3, desc="New one") as bar:
            bar.set_description("anything")
            bar.update(3)
    assert reporter.steps == [
        ("load weights", 1, 2),
        ("load weights", 2, 2),
        ("read GGUF", 1, 2),
        ("read GGUF", 2, 2),
        ("New one", 3, 3),
    ]
    assert gguf.tqdm is before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "evaluated"), [(5.0, 100.0)])
def test_an_evaluation_is_no_training_time(seconds, evaluated, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ismdata.train.metrics.time.monotonic", lambda: now[0])
    metrics = RunMetrics(tmp_path)
    metrics.begin(None, write=False)
    now[0] += seconds
    with metrics.paused():
        now[0] += evaluated
    metrics.add_step(loss=1.0, correct=1, tokens=10, target_tokens=5, pairs=7)
    assert (metrics.elapsed(), metrics.sums.seconds) == (seconds, seconds)
    assert metrics.speed() == (2.0, 1.0)
