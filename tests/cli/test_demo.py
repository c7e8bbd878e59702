"""The demo walks the whole road, says the commands it stands for, and does not write over a folder in use."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ismdata.cli.demo import VOCAB_SIZE, run_demo, sample_files
from ismdata.cli.main import app
from ismdata.data.verification import verify
from ismdata.errors import UsageError
from ismdata.rendering import train_tokenizer

pytestmark = pytest.mark.slow  # runs the whole pipeline

SAMPLE_TEXTS = [file.read_text(encoding="utf-8") for file in sample_files()]
TOKENIZER = train_tokenizer(SAMPLE_TEXTS, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo with hardly any training, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_demo(output, steps=2)
    return output, printed.getvalue()


def test_leaves_every_folder(walked: tuple[Path, str]) -> None:
    output, _ = walked
    assert {path.name for path in output.iterdir()} == {"converted", "tokenizer", "packed", "model"}
    assert verify(output / "converted").ok
    assert verify(output / "packed").ok
    assert (output / "model" / "metrics.csv").is_file()


def test_its_commands_exist_and_cover_the_road(walked: tuple[Path, str]) -> None:
    _, printed = walked
    lines = [shlex.split(line) for line in re.findall(r"^(?:\$|) +(ismdata .*)$", printed, flags=re.MULTILINE)]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in lines:
        command = commands[words[1]]
        command = getattr(command, "commands", {}).get(words[2], command)
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, words
    assert {words[1] for words in lines} == set(commands) - {
        "demo",
        "bench",
        "eval",
        "template",
    }  # measuring and looking are no steps


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(UsageError, match="is not empty"):
        run_demo(tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_gives_back_any_text(text: str) -> None:
    ids = TOKENIZER([text], add_special_tokens=False)["input_ids"][0]
    assert TOKENIZER.decode(ids) == text


def test_tokenizer_loads_like_any_other(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(loaded) == 2000
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(loaded.encode(token, add_special_tokens=False)) == 1
    assert loaded.get_vocab() == TOKENIZER.get_vocab()


def test_tokenizer_is_the_same_every_time() -> None:
    assert (
        train_tokenizer(SAMPLE_TEXTS, vocab_size=VOCAB_SIZE).backend_tokenizer.to_str()
        == TOKENIZER.backend_tokenizer.to_str()
    )
