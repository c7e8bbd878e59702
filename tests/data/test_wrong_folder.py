"""The wrong folder, and what to type then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ismdata.data import next_step
from ismdata.data.wrong_folder import kind_of


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, file, content in (
        ("packed", "index.json", json.dumps({"format": "ismdata.packed/1"})),
        ("conversations", "index.json", json.dumps({"format": "ismdata.conversations/1"})),
        ("model", "config.json", "{}"),
        ("tokenizer", "tokenizer.json", "{}"),
        ("folder", "index.json", '{"format": '),
        ("odd", "index.json", "[1]"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content, encoding="utf-8")
    (tmp_path / "a b.jsonl").write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["packed", "conversations", "model", "tokenizer", "folder"])
def test_kinds(folders: Path, name: str) -> None:
    assert kind_of(Path(name)) == name
    assert kind_of(Path("odd")) == "folder"


@pytest.mark.parametrize(
    ("path", "packed", "expected"),
    [
        ("a b.jsonl", False, "Convert it first: ismdata convert 'a b.jsonl' -o converted"),
        ("packed", False, "It is packed already. Train on it: ismdata train packed --model tiny -o model"),
        ("conversations", True, "Pack it first: ismdata pack conversations -o packed --tokenizer NAME"),
        ("model", True, "It is a model. Talk with it: ismdata chat model"),
        ("tokenizer", False, "It is a tokenizer. Pack with it: ismdata pack converted -o packed --tokenizer tokenizer"),
        ("packd", True, "Did you mean packed?"),
        ("nowhere/zzz", True, "Make one: ismdata pack converted -o nowhere/zzz --tokenizer NAME"),
    ],
)
def test_the_next_command(folders: Path, path: str, packed: bool, expected: str) -> None:
    assert next_step(Path(path), packed=packed) == f" {expected}"
