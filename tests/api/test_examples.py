"""The examples train: other people's loops and trainers, given our dataset and collator."""

from __future__ import annotations

import json
import runpy

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.tiny import tiny_model, write_packed
from tests.support.training_shards import copying_rows, word_tokenizer

pytestmark = pytest.mark.slow  # trains

EXAMPLES = ROOT / "examples"
NEEDS = {"plain_pytorch": "torch", "with_accelerate": "accelerate", "with_lightning": "lightning", "with_trl": "trl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("examples")
    word_tokenizer(write_packed(root / "packed", copying_rows(8)) / "tokenizer")
    tiny_model(dtype=torch.float32).save_pretrained(root / "model")
    return root


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name, folders, tmp_path):
    pytest.importorskip(NEEDS[name])
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    torch.manual_seed(0)
    losses = example["main"](str(folders / "packed"), str(folders / "model"), str(tmp_path / "out"), 12)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["ismdata_mask"] == "ism"
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        folders / "packed/tokenizer/tokenizer.json"
    ).read_bytes()


def test_there_is_a_test_for_each_example():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
