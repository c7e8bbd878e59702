"""The benchmark of the theory: linear self-attention written out gives its recursion, and where each mask rests."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # trains

SCRIPT = ROOT / "benchmarks" / "convergence.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convergence_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def attention_layers(x, y, sees, *, step, layers):
    """Linear self-attention written out: tokens z = (x, y), queries and keys are x, the value is -step / n times y."""
    tokens = np.concatenate([x, y[:, None]], axis=1)  # [N, D + 1]
    width = tokens.shape[1]
    only_x, only_y = np.diag([1.0] * (width - 1) + [0.0]), np.diag([0.0] * (width - 1) + [1.0])
    for _ in range(layers):
        scores = (tokens @ only_x) @ (tokens @ only_x).T  # no softmax
        tokens = tokens + np.where(sees, scores, 0.0) @ (tokens @ only_y) * (-step / len(x))
    return tokens[:, -1]


@pytest.mark.parametrize("mask", ["prefix", "ism", "causal"])
def test_the_recursion_is_linear_self_attention(script, mask):
    setting = script.Setting(dimension=3, groups=3, pairs=4)
    x, y = setting.draw(1)
    seen = setting.seen(mask)
    sees = np.arange(12)[None] < seen[:, None]
    (weights,) = script.descend(x[None], y[None], seen, step=0.3, layers=[40])
    expected = attention_layers(x, y, sees, step=0.3, layers=40)
    np.testing.assert_allclose(y - (weights[0] * x).sum(-1), expected, rtol=0, atol=1e-12)
    assert np.abs(expected - y).max() > 0.1


def test_who_sees_whom(script):
    setting = script.Setting(groups=2, pairs=3)
    assert setting.seen("prefix").tolist() == [6] * 6
    assert setting.seen("ism").tolist() == [3, 3, 3, 6, 6, 6]
    assert setting.seen("causal").tolist() == [1, 2, 3, 4, 5, 6]


def test_where_each_mask_comes_to_rest(script):
    """prefix on w*, each group under ism on its own least squares, under causal each pair on its own equation."""
    setting = script.Setting(dimension=2, groups=3, pairs=8)
    x, y = setting.draw(0)
    rest = {
        mask: script.descend(x[None], y[None], setting.seen(mask), step=0.8, layers=[30_000])[0, 0]
        for mask in script.MASKS
    }
    np.testing.assert_allclose(rest["prefix"], np.tile(np.linalg.lstsq(x, y, rcond=None)[0], (24, 1)), atol=1e-12)
    for group in range(3):
        of = slice(8 * group, 8 * (group + 1))
        own = np.linalg.lstsq(x[of], y[of], rcond=None)[0]
        np.testing.assert_allclose(rest["ism"][of], np.tile(own, (8, 1)), atol=1e-9)
    errors = np.abs((rest["causal"] * x).sum(-1) - y)
    assert np.median(errors) < 1e-3 < 0.1 < np.median(np.abs((rest["prefix"] * x).sum(-1) - y))


def test_the_figures_of_the_documentation(script):
    setting = script.Setting()
    found = script.distances(setting, [0], [setting.layers])
    last = {mask: float(script.last_group(setting, found[mask][-1, 0])) for mask in script.MASKS}
    assert last["prefix"] < 1e-12
    assert round(last["ism"], 2) == 0.38
    assert round(last["causal"], 2) == 0.98


def test_results_and_picture(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path / "out"), "--layers", "60", "--draws", "4"])
    script.main()
    results = json.loads((tmp_path / "out" / "convergence.json").read_text())
    assert results["setting"]["layers"] == results["by_layer"]["layers"][-1] == 60
    assert results["by_layer"]["ism"][-1] == results["last_group"]["ism"]
    assert len(results["by_pair"]["causal"]) == 72
    assert (tmp_path / "out" / "convergence.svg").read_text().startswith("<?xml")
    assert "least squares of the last group alone" in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_there(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path / "out"), "--layers", "5", "--draws", "2"])
    with pytest.raises(SystemExit, match="ismdata\\[plots\\]"):
        script.main()
    assert (tmp_path / "out" / "convergence.json").exists()
