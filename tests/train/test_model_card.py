"""The model card: a name for a title, where the model and its data come from, how to load it, and no local path."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load

from ismdata.data import source_of
from ismdata.train.model_card import BaseModel, describe_base
from tests.support.tiny import tiny_model, write_packed
from tests.support.training_shards import copying_rows, packed_folder, run, word_tokenizer

#: A name that Markdown, YAML, TOML and a shell could each misread.
HOSTILE = "my|model: `x` [a](b) <i> #1 'q' \"d\" \\ \u202e"


def card_of(output):
    """The card's metadata and its text."""
    return metadata_load(output / "README.md"), (output / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run from folders with hostile names, with adapters and an evaluation."""
    secret = tmp_path_factory.mktemp("secret-home")
    base = secret / HOSTILE
    tiny_model(dtype=torch.float32).save_pretrained(base)
    rows = copying_rows(7)
    for number, row in enumerate(rows):
        names = [f"daily-train-{6 * number + k + 1}" for k in range(len(row.sequence.conversation_ids) - 1)]
        row.sequence.conversation_ids[:] = [*names, f"{number:08x}"]
    packed = write_packed(secret / "packed", rows)
    word_tokenizer(packed / "tokenizer")
    output = secret / "out put"
    run(packed, output, model=str(base), steps=2, lora=True, eval=str(packed))
    return secret, output


@pytest.mark.slow
def test_nothing_to_be_published_has_a_path_of_the_machine(published):
    secret, output = published
    for path in output.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            assert secret.name.encode() not in path.read_bytes(), path
    assert [path.parent.name for path in output.rglob("README.md") if "checkpoints" not in path.parts] == ["out put"]


@pytest.mark.slow
def test_the_card_names_what_it_knows(published):
    _, output = published
    data, text = card_of(output)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
    assert title == "my-model: -x- -a-(b) -i- #1 'q' \"d\" \\ \\u202e · ism"
    assert data["tags"] == ["ismdata", "ism"]
    assert "base_model" not in data and "license" not in data
    metrics = {each["type"]: each["value"] for each in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]), rel=1e-3)
    assert 0 <= metrics["accuracy"] <= 1
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "packed"
    assert "| daily-train | 35 |" in text
    assert "## Evaluation" in text
    assert 'eval = "packed"' in text


@pytest.mark.slow
def test_the_code_of_the_card_runs(published, monkeypatch):
    secret, output = published
    monkeypatch.chdir(secret)
    blocks = re.findall(r"```python\n(.*?)```", card_of(output)[1], re.DOTALL)
    loading, adapters = blocks
    namespace = {}
    exec(loading.partition("session =")[0], namespace)  # the tokenizer of these shards has no chat template
    assert namespace["model"].config.ismdata_mask == "ism"
    title = json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert json.dumps(title) in adapters
    exec(adapters.replace(json.dumps(title), repr(str(secret / HOSTILE))), namespace)


@pytest.mark.slow
def test_a_model_trained_twice_keeps_its_origin(tmp_path):
    first = tmp_path / "first"
    tiny_model(dtype=torch.float32).save_pretrained(first)
    (first / "README.md").write_text("---\nbase_model: org/base\nlicense: apache-2.0\ntags: [ismdata, ism]\n---\n")
    packed = packed_folder(tmp_path / "packed", 3)
    run(packed, tmp_path / "second", model=str(first))
    data, text = card_of(tmp_path / "second")
    assert (data["base_model"], data["license"]) == ("org/base", "apache-2.0")
    assert "# base · ism" in text
    assert "model-index" not in data


def test_a_preset_has_no_base_model():
    assert describe_base("tiny") == BaseModel(name="tiny")


def test_a_hub_name_is_the_base_model():
    assert describe_base("org/Model-1B") == BaseModel(name="Model-1B", hub_name="org/Model-1B")


def test_a_folder_of_the_hub_cache_is_the_model_that_it_holds(tmp_path):
    folder = tmp_path / "models--org--Model" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/older\n---\n")
    assert describe_base(str(folder)) == BaseModel(name="Model", hub_name="org/Model", licence="mit")


@pytest.mark.parametrize(
    "card", ["", "no metadata", "---\n- a list\n---\n", "---\n: : [\n---\n", "---\nlicense: [1]\n---\n"]
)
def test_a_card_that_says_nothing_is_no_error(card, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text(card)
    assert describe_base(str(tmp_path / "m")) == BaseModel(name="m")


def write_gguf(path, **fields):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        writer.add_string(f"general.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("file", "fields", "expected"),
    [
        ("X.Q4_1.gguf", {}, BaseModel(name="X")),
        (
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            {"organization": "HuggingFaceTB", "basename": "smollm2", "size_label": "135M", "license": "apache-2.0"},
            BaseModel(
                name="SmolLM2-135M-Instruct",
                hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
                licence="apache-2.0",
            ),
        ),
        (
            "renamed-F16.gguf",
            {"organization": "Org", "basename": "smollm2", "size_label": "135M"},
            BaseModel(name="renamed"),
        ),
        ("y.gguf", {"base_model.0.repo_url": "https://huggingface.co/a/b"}, BaseModel(name="y", hub_name="a/b")),
        ("z.gguf", {"name": "/home/me/z", "license": "My own: see file"}, BaseModel(name="z")),
    ],
)
def test_a_gguf_file_says_where_it_comes_from(file, fields, expected, tmp_path):
    write_gguf(tmp_path / file, **fields)
    assert describe_base(str(tmp_path / file)) == expected


@pytest.mark.parametrize(
    ("name", "source"),
    [("a-1", "a"), ("a-b-12/x#3", "a-b"), ("a-01", None), ("12", None), ("-1", None), ("é ü-7", "é ü"), ("", None)],
)
def test_sources_are_read_from_ids(name, source):
    assert source_of(name) == source
