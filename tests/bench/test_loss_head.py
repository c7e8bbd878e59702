"""The ways to compute the loss that `ismdata bench attention` compares are one loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ismdata.bench.attention import loss_head
from ismdata.bench.attention.loss_head import WAYS, LossRow, measure_size
from ismdata.cli import app

CPU = torch.device("cpu")


def test_all_ways_give_the_same_loss_and_gradients() -> None:
    torch.manual_seed(0)
    rows, head = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    target = torch.randint(11, (7,))
    losses = {way: loss(rows, head, target) for way, loss in WAYS.items() if way != "torch's chunks"}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        losses["torch's chunks"] = WAYS["torch's chunks"](rows, head, target)
    expected = torch.autograd.grad(losses["all logits"], (rows, head), retain_graph=True)
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["all logits"])
        torch.testing.assert_close(torch.autograd.grad(loss, (rows, head), retain_graph=False), expected)
        losses["all logits"] = WAYS["all logits"](rows, head, target)


def test_a_row_per_way() -> None:
    rows = measure_size(6, 4, 9, device=CPU, dtype=torch.float32, rounds=2)
    assert [row.way for row in rows] == list(WAYS)
    for row in rows:
        assert not row.failed
        if not row.note:
            assert row.seconds is not None
            assert row.peak_bytes is not None
            assert len(row.details["laps"]) == 2
            assert "loss of 6 × 4 × 9" in row.line()


def test_a_way_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(WAYS, "at targets", broken)
    base, ours, _ = measure_size(6, 4, 9, device=CPU, dtype=torch.float32, rounds=1)
    assert (ours.failed, ours.seconds, ours.note) == (True, None, "failed: RuntimeError: no such kernel")
    assert base.ratio == 1


@pytest.mark.slow
def test_the_command_has_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_head.SIZES, "cpu", ((6, 4, 9),))
    words = ["bench", "attention", "--device", "cpu", "--rounds", "1", "--only", "loss", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "6 × 4 × 9" in result.stdout
    results = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [LossRow(**row).way for row in results["losses"]] == list(WAYS)
