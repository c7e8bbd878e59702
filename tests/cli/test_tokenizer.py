"""`ismdata tokenizer train`: a tokenizer that packs any text, and that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ismdata.cli import app
from ismdata.data import PackedDataset, verify
from ismdata.errors import UsageError
from ismdata.pack import pack
from ismdata.rendering import SavedTokenizer, load_pretrained, train_tokenizer

SMALL = train_tokenizer(["Guten Tag, wie geht es Ihnen?"] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    talks = [
        [
            {"role": "user", "content": f"How many apples are {k} and {k}?"},
            {"role": "assistant", "content": f"{2 * k} apples.", "reasoning_content": "wombat wombat"},
        ]
        for k in range(60)
    ]
    lines = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    (folder / "talks.jsonl").write_text(lines, encoding="utf-8")
    result = CliRunner().invoke(app, ["convert", str(folder / "talks.jsonl"), "-o", str(folder / "converted")])
    assert result.exit_code == 0, result.output
    return folder / "converted"


def train(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["tokenizer", "train", *map(str, words)])
    return result.exit_code, result.output


def test_a_corpus_is_packed_with_a_tokenizer_of_its_own(converted: Path, tmp_path: Path) -> None:
    code, output = train(converted, "-o", tmp_path / "tokenizer", "--vocab-size", 320)
    assert code == 0, output
    assert "320 tokens, chat template ChatML" in output
    assert "ismdata pack" in output
    trained = load_pretrained(str(tmp_path / "tokenizer"))
    assert isinstance(trained, SavedTokenizer)
    assert {"Ġapples", "Ġwombat"} <= trained.get_vocab().keys()  # reasoning is text, too
    pack([converted], tmp_path / "packed", tokenizer=str(tmp_path / "tokenizer"), seq_len=256)
    assert verify(tmp_path / "packed").ok
    assert len(PackedDataset(tmp_path / "packed")) > 0


def test_transformers_loads_it(converted: Path, tmp_path: Path) -> None:
    train(converted, "-o", tmp_path / "tokenizer", "--vocab-size", 300)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert (theirs.eos_token, theirs.pad_token, len(theirs)) == ("<|im_end|>", "<|endoftext|>", 300)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = theirs.apply_chat_template(talk, tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


def test_a_corpus_with_fewer_pairs_gets_fewer_tokens(converted: Path, tmp_path: Path) -> None:
    code, output = train(converted, "-o", tmp_path / "tokenizer", "--vocab-size", 50_000)
    assert code == 0
    assert "50,000 were asked for" in output


def test_a_folder_that_is_in_use_is_refused(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "mine.txt").touch()
    code, _ = train(converted, "-o", tmp_path / "tokenizer")
    assert code == 2
    assert [path.name for path in (tmp_path / "tokenizer").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", [-1, 0, 258])
def test_a_vocabulary_without_all_bytes_is_refused(size: int, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected at least 259"):
        train_tokenizer(["a"], vocab_size=size)
    code, output = train(converted, "-o", tmp_path / "tokenizer", "--vocab-size", size)
    assert code == 2
    assert "--vocab-size" in output
    assert not (tmp_path / "tokenizer").exists()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = SMALL([text], add_special_tokens=False)["input_ids"][0]
    assert SMALL.decode(ids) == text
