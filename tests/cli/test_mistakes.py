"""Mistakes of a first hour: each ends with its exit code, in a line that says what is wrong and what to type next."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.command_line import ismdata
from tests.support.handmade import ConvertedFolder, PackedFolder

GOOD = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})

#: Where the call is at fault (2), and where a file is (1): the words -> what the message must say.
CALLS: list[tuple[str, list[str]]] = [
    # ---- no command, no argument ----
    ("pakc", ["`ismdata pack`"]),
    ("help", ["`ismdata --help`"]),
    ("version", ["`ismdata --version`"]),
    ("sft", ["`ismdata train`"]),
    ("a.jsonl", ["`ismdata convert a.jsonl -o converted`"]),
    ("zzz", ["one of convert, pack"]),
    ("bench dat", ["`ismdata bench data`"]),
    ("--verison", ["--version"]),
    ("convert", ["lacks SOURCES", "`ismdata convert --help`"]),
    ("convert -o out", ["lacks SOURCES"]),
    ("convert a.jsonl", ["--output FOLDER"]),
    ("pack", ["lacks CONVERTED"]),
    ("pack conv -o out", ["lacks --tokenizer"]),
    ("pack conv --tokenizer tokenizer", ["lacks --output"]),
    ("train", ["lacks PACKED"]),
    ("train packed --model tiny", ["lacks --output"]),
    ("train packed -o out", ["--model"]),
    ("eval model", ["lacks PACKED"]),
    ("chat", ["lacks MODEL"]),
    ("inspect", ["lacks FOLDER"]),
    ("verify", ["lacks FOLDER"]),
    ("template", ["lacks TOKENIZER_OR_FILE"]),
    # ---- options ----
    ("train packed --max-steps 3 -o out", ["TRL", "is --steps here"]),
    ("train packed --num_train_epochs 3 -o out", ["is --epochs here"]),
    ("train packed --per_device_train_batch_size 3", ["is --batch-size here"]),
    ("train packed --gradient_accumulation_steps 3", ["is --accumulation here"]),
    ("train packed --lr 3", ["is --learning-rate here"]),
    ("train packed --warmup_ratio 3", ["is --warmup here"]),
    ("train packed --model_name_or_path tiny", ["is --model here"]),
    ("train packed --output_dir out", ["is --output here"]),
    ("train packed --cutoff_len 3", ["`ismdata pack --seq-len`"]),
    ("train packed --max_seq_length=3", ["`ismdata pack --seq-len`"]),
    ("train packed --sample_packing", ["`ismdata pack` always packs"]),
    ("train packed --train_on_inputs false", ["only answers are trained"]),
    ("train packed --val_size 0.1", ["`ismdata convert --split`"]),
    ("train packed --seq-len 512", ["option of `ismdata pack`"]),
    ("pack conv --lora", ["option of `ismdata train`"]),
    ("pack conv --seq_len 512", ["Did you mean --seq-len?"]),
    ("convert a.jsonl --overwite", ["Did you mean --overwrite?"]),
    ("train packed -o", ["'-o' requires an argument", "`ismdata train --help`"]),
    ("convert a.jsonl -o out --overwrite=yes", ["does not take a value"]),
    ("train packed other -o out", ["'other' is left over", "quotes"]),
    # ---- values ----
    ("pack conv -o out --tokenizer tokenizer --mask imm", ["'imm'", "Did you mean 'ism'?"]),
    ("pack conv -o out --tokenizer tokenizer --mask full", ["ism, causal, prefix"]),
    ("pack conv -o out --tokenizer tokenizer --seq-len 1000", ["multiple of 128", "1024"]),
    ("pack conv -o out --tokenizer tokenizer --seq-len 8k", ["'8k'", "a whole number"]),
    ("pack conv -o out --tokenizer tokenizer --seq-len=8k", ["'8k'"]),
    ("pack conv -o out --tokenizer tokenizer --seq-len -128", ["multiple of 128"]),
    ("pack conv -o out --tokenizer tokenizer --template-arg x", ["NAME=VALUE"]),
    ("pack conv -o out --tokenizer tokenizer --template-date today", ["YYYY-MM-DD"]),
    ("pack conv -o out --tokenizer tokenizer --workers -1", ["0 (all cores) or more"]),
    ("pack conv -o out --tokenizer tokenizer --prefix-every 2", ["--mask prefix"]),
    ("pack conv conv -o out --tokenizer tokenizer", ["named twice"]),
    ("convert a.jsonl -o out --format sharegtp", ["expected auto", "sharegpt"]),
    ("convert a.jsonl -o out --role bot", ["NAME=ROLE"]),
    ("convert a.jsonl -o out --role bot=asistant0", ["system, user, assistant, tool"]),
    ("convert a.jsonl -o out --split 0.9", ["98/2"]),
    ("convert a.jsonl -o out --split 90/20", ["adds up to 110"]),
    ("convert a.jsonl -o out --sample 0", ["1 or more"]),
    ("convert a.jsonl -o out --min-turns -2", ["0 or more"]),
    ("convert a.jsonl -o out --workers -1", ["or more"]),
    ("convert a.jsonl -o out --exclude (", ["regular expression"]),
    ("convert a.jsonl -o out --dedup fuzzy", ["exact, near"]),
    ("convert a.jsonl -o out --assistant user", ["second, first, both"]),
    ("train packed --model tiny -o out --steps 1.5", ["'1.5'", "a whole number"]),
    ("train packed --model tiny -o out --steps 0", ["1 or more"]),
    ("train packed --model tiny -o out --learning-rate -1", ["above 0"]),
    ("train packed --model tiny -o out --learning-rate 1e-4x", ["'1e-4x'", "a number"]),
    ("train packed --model tiny -o out --precision fp16", ["auto, float32, bfloat16"]),
    ("train packed --model tiny -o out --backend flash", ["auto, sdpa, flex, varlen"]),
    ("inspect packed --row 99", ["--row 99", "expected 0 to 2"]),
    # ---- outputs ----
    ("convert a.jsonl -o conv", ["in use", "--overwrite"]),
    ("convert a.jsonl -o file", ["is a file", "Name another"]),
    ("convert a.jsonl -o notes --overwrite", ["no output of this command"]),
    ("pack conv -o conv/packed --tokenizer tokenizer", ["lies inside the input conv", "Name another"]),
    ("pack conv -o packed --tokenizer tokenizer", ["in use"]),
]
FILES: list[tuple[str, list[str]]] = [
    ("convert missing.jsonl -o out", ["no such file", "Check the name"]),
    ("convert nope/*.jsonl -o out", ["matches", "Check the pattern"]),
    ("convert empty.jsonl -o out", ["no record", "Check"]),
    ("convert empty -o out", ["holds nothing", "Name a file"]),
    ("convert odd.jsonl -o out", ["`ismdata convert --explain odd.jsonl`"]),
    ("convert https://example.org/a.jsonl -o out", ["URL", "Download it"]),
    ("convert my file.jsonl -o out", ["my: no such file"]),
    ("convert a.jsonl -o out --against missing.jsonl", ["missing.jsonl"]),
    ("pack a.jsonl -o out --tokenizer tokenizer", ["found a file", "ismdata convert a.jsonl -o converted"]),
    ("pack packed -o out --tokenizer tokenizer", ["packed already", "ismdata train packed --model tiny -o model"]),
    ("pack model -o out --tokenizer tokenizer", ["It is a model", "ismdata chat model"]),
    ("pack missing -o out --tokenizer tokenizer", ["found nothing", "ismdata convert FILE -o missing"]),
    ("pack empty -o out --tokenizer tokenizer", ["no index.json", "Convert it first"]),
    ("pack conv -o out --tokenizer conv", ["without tokenizer.json", "a model folder"]),
    ("pack conv -o out --tokenizer a.jsonl", ["is a file"]),
    ("pack conv -o out --tokenizer ./tokenize", ["Did you mean 'tokenizer'?"]),
    ("verify missing", ["found nothing"]),
    ("verify a.jsonl", ["found a file", "ismdata convert a.jsonl"]),
    ("inspect model", ["no index.json", "ismdata chat model"]),
    ("inspect pakced", ["Did you mean packed?"]),
    ("template conv", ["without tokenizer.json"]),
    ("train packed --model ./tinny/x -o out", ["no such file", "tiny"]),
    ("train packed --model tiny -o out --config missing.toml", ["TOML file of options"]),
    ("train packed --model tiny -o out --config c.toml", ["'max_steps'", "'steps' here"]),
    ("train packed --model tiny -o out --config a.jsonl", ["not valid TOML", "learning_rate = 1e-4"]),
    ("chat ./nowhere", ["no such file"]),
    ("eval ./nowhere packed", ["no such file"]),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a new user has got so far."""
    monkeypatch.chdir(tmp_path)
    ConvertedFolder(tmp_path / "conv")
    PackedFolder(tmp_path / "packed")
    for name in ("empty", "model", "notes", "tokenizer"):
        (tmp_path / name).mkdir()
    for name, text in (
        ("a.jsonl", GOOD + "\n"),
        ("empty.jsonl", ""),
        ("odd.jsonl", '{"a": 1}\n'),
        ("file", "x"),
        ("notes/mine.txt", "keep"),
        ("model/config.json", "{}"),
        ("tokenizer/tokenizer.json", "{}"),
        ("c.toml", "max_steps = 3\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("line", "parts", "code"),
    [*((line, parts, 2) for line, parts in CALLS), *((line, parts, 1) for line, parts in FILES)],
    ids=[line for line, _ in CALLS + FILES],
)
def test_a_mistake(line: str, parts: list[str], code: int, here: Path) -> None:
    before = listing(here)
    ended = ismdata(*line.split())
    assert ended.code == code, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    for part in parts:
        assert part in ended.stderr
    assert listing(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written(here: Path) -> None:
    (here / "closed").mkdir(mode=0o500)
    ended = ismdata("convert", "a.jsonl", "-o", "closed/out")
    assert ended.code == 1
    assert "Permission denied" in ended.stderr


# ---- hostile names ----

NAMES = ["a[b].jsonl", "x[/b].jsonl", "[red]r[/red].jsonl", ":smile:.jsonl", "\x1b[2J\x07.jsonl", "\u202egpj.jsonl"]
NAMES += ["line\nerror: forged.jsonl", "{x} %s.jsonl", "\udcff\udcfe.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_goes_through_every_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = "bytes" if name.startswith("\udcff") else name.removesuffix(".jsonl")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(f"{GOOD}\n{GOOD}\n{name!a}\n", encoding="utf-8")
    calls = [("convert", f"./{name}", "--explain"), ("convert", f"./{name}", "-o", f"out/{folder}")]
    calls += [(command, f"out/{folder}") for command in ("inspect", "verify")]
    calls += [("inspect", f"out/{folder}", "--json"), ("pack", f"out/{folder}", "-o", "p", "--tokenizer", f"./{name}")]
    calls += [("train", f"./{name}", "-o", "m", "--model", "tiny"), ("chat", f"./{folder}"), (name,), (f"--{name}",)]
    calls += [("inspect", f"out/{folder}", "--row", name), ("template", f"./{folder}"), ("pack", "--mask", name)]
    for number, call in enumerate(calls):
        ended = ismdata(*call)
        assert ended.code == 0 if number < 5 else ended.code in (1, 2), (call, ended)
        assert "Traceback" not in ended.stderr
        for text in (ended.stdout, ended.stderr):
            assert not {"\x1b", "\x07", "\u202e"} & set(text)
            assert "\nerror: forged" not in text
    if folder == "bytes":
        assert "not UTF-8" in ismdata("convert", f"./{name}", "-o", name).stderr
    assert "[b]" not in name or "a[b]" in ismdata("inspect", f"out/{folder}").stdout
