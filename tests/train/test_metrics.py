"""metrics.csv and the sums between two of its lines."""

from __future__ import annotations

import pytest

from ismdata.train.metrics import METRICS, RunMetrics, read_column


def test_accuracy_is_over_the_targets_of_all_steps_since_the_last_line(tmp_path):
    metrics = RunMetrics(tmp_path)
    metrics.begin(None, write=True)
    for correct, targets in ((1, 2), (30, 100)):
        metrics.add_step(loss=1.0, correct=correct, tokens=200, target_tokens=targets, pairs=9)
    assert metrics.close_window() == (1.0, pytest.approx(31 / 102))  # not the mean of 1/2 and 30/100
    metrics.add_step(loss=3.0, correct=0, tokens=200, target_tokens=0, pairs=9)
    assert metrics.close_window() == (3.0, 0.0)
    assert metrics.sums.target_tokens == 102


def test_a_checkpoint_with_fewer_columns_is_continued(tmp_path):
    """As an earlier version wrote it."""
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "metrics.csv").write_text("step,loss,seconds,eval_loss\n1,2.5,0.1,\n1,,0.2,2.75\n")
    (checkpoint / "progress.json").write_text('{"tokens": 7, "seconds": 0.2, "window_steps": 0}')
    metrics = RunMetrics(tmp_path)
    metrics.begin(checkpoint, write=True)
    metrics.line(2, loss=2.0, token_accuracy=0.5)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == ",".join(METRICS)
    assert {line.count(",") for line in lines} == {len(METRICS) - 1}
    assert read_column(tmp_path / "metrics.csv", "loss") == [(1, 2.5), (2, 2.0)]
    assert read_column(tmp_path / "metrics.csv", "eval_loss") == [(1, 2.75)]
    assert read_column(tmp_path / "metrics.csv", "token_accuracy") == [(2, 0.5)]
