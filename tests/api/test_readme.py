"""The commands of the README run as they stand, each on the files that the ones before it made."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from ismdata.cli import app
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.paths import ROOT

#: The model that the README names; a small one with the same name stands in for it.
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def block_below(heading: str) -> list[list[str]]:
    """The commands of the first code block below a heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert block
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.startswith("ismdata ")]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README asks for: the two files, and a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, count in (("train", 60), ("validation", 30)):
        roles = ["user", "assistant"] * 4
        talks = [
            {"messages": [{"role": role, "content": f"{name} {k} {n}"} for n, role in enumerate(roles)]}
            for k in range(count)
        ]
        lines = "".join(json.dumps(talk) + "\n" for talk in talks)
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    save_tokenizer(tmp_path / MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / MODEL)
    return tmp_path


@pytest.mark.slow
def test_its_commands_run_one_after_the_other(prepared: Path) -> None:
    commands = block_below("Your own data")
    assert [words[1] for words in commands] == [
        "convert", "inspect", "template", "pack", "verify", "inspect", "train", "eval", "chat",
    ]  # fmt: skip
    for words in commands:
        result = CliRunner().invoke(app, words[1:], input="Hello\n")
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    assert {path.name for path in prepared.iterdir() if path.is_dir()} >= {"converted", "packed", "model"}
