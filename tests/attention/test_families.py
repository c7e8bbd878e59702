"""benchmarks/families.py: families of every kind are right or refused with a reason, and its checks can fail."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import pytest
import torch

from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.backends.sdpa import dense_attention
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def families():
    torch.set_num_threads(1)  # for such small models more threads are slower
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("families")
    sys.path.remove(str(ROOT / "benchmarks"))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "opt",  # learned positions; the gradient of its keys' bias is zero but for rounding
        "seed_oss",  # dropout of attention weights and of the residual stream
        pytest.param("mixtral", marks=slow),  # experts, also in float32; windows
        pytest.param("deepseek_v3", marks=slow),  # latent attention: values narrower than keys
        pytest.param("gemma4_text", marks=slow),  # keys shared between layers, heads of two widths, windows
        pytest.param("diffllama", marks=slow),  # two calls a layer
    ],
)
def test_a_family_is_right(name, families):
    found = families.judge(name)
    assert (found["verdict"], found["reason"]) == ("right", "")
    assert {each["verdict"] for each in found["backends"].values()} == {"right"}
    assert {each["verdict"] for each in found["more"].values()} == {"right"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("doge", "a mask or a bias of its own"),
        ("gpt_oss", "attention sinks"),
        ("xlm-roberta", "counts positions in another way"),
        ("deepseek_v32", "choose or merge keys by scores"),
        ("zaya", "a convolution or a state beside their attention"),
    ],
)
def test_a_family_is_refused_under_every_backend(name, reason, families):
    found = families.judge(name)
    assert found["verdict"] == "refused"
    for each in found["backends"].values():
        assert reason in each["reason"]
        assert each["reason"].endswith("Use another model")


def test_a_family_that_cannot_be_built_says_why(families, monkeypatch):
    monkeypatch.setitem(families.VARIANTS, "broken", ("llama", {"num_attention_heads": 5}))
    found = families.judge("broken")
    assert found["verdict"] == "not buildable"
    assert "heads" in found["reason"]


def test_a_backend_with_wrong_gradients_is_called_wrong(families, monkeypatch):
    """The canary of `attach` computes no gradients."""

    def scaled_gradient(call):
        return dense_attention(call._replace(key=call.key + (call.key - call.key.detach()) / 64))

    wrong = dataclasses.replace(BACKENDS["sdpa"], compute=scaled_gradient)
    monkeypatch.setattr(families, "BACKENDS", {"sdpa": wrong})
    monkeypatch.setitem(BACKENDS, "sdpa", wrong)
    found = families.judge("llama")
    assert found["verdict"] == "wrong"
    assert "gradient of" in found["reason"]


@pytest.mark.slow
def test_the_command_writes_results_and_a_table(families, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{families.BEGIN}\nold\n{families.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["families.py", "-o", str(tmp_path / "out"), "doge", "whisper"])
    assert families.main() == 0
    facts = json.loads((tmp_path / "out" / "families.json").read_text())
    assert [each["verdict"] for each in facts["families"]] == ["refused", "refused"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("2 refused.\n")
    assert "| refused | `doge` | gives its attention a mask or a bias of its own" in table
    families.write_docs(table, page)
    assert page.read_text() == f"before\n{families.BEGIN}\n\n{table}\n{families.END}\nafter\n"


def test_a_family_that_takes_too_long_is_ended(families, monkeypatch):
    monkeypatch.setattr(families, "judge", lambda name: __import__("time").sleep(60))
    found = families.judge_in_time("llama", 0.5)
    assert found["verdict"] == "not finished"
    assert found["seconds"] < 30
