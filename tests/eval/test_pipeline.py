"""`ismdata eval` from outside: the files it writes, comparisons, and what it refuses before the first batch."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from ismdata.cli.main import app
from ismdata.convert.pipeline import convert
from ismdata.data.index import load_index, write_index
from ismdata.eval import pipeline as eval_pipeline
from ismdata.eval.bootstrap import Bootstrap
from ismdata.eval.results import compare, read_results
from ismdata.pack.pipeline import pack
from ismdata.rendering import train_tokenizer
from tests.support.paths import SCHEMAS
from tests.support.tiny import ANSWER, QUERY, sample, write_packed

SCHEMA = json.loads((SCHEMAS / "eval.schema.json").read_text(encoding="utf-8"))
WORDS = ["red", "green", "blue", "one", "two", "three", "north", "south"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words):
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(result, code, *parts):
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def save_model(folder, *, vocab_size, mask="ism", seed=0, **sizes):
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**small, **sizes, vocab_size=vocab_size, initializer_range=0.2, eos_token_id=None)
    if mask is not None:
        config.ismdata_mask = mask
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A corpus packed three ways, and two models."""
    base = tmp_path_factory.mktemp("eval")
    generator = np.random.default_rng(0)
    with (base / "talks.jsonl").open("w", encoding="utf-8") as file:
        for number in range(12):
            roles = ["user", "assistant"] * int(generator.integers(1, 5))
            said = [" ".join(generator.choice(WORDS, 4)) for _ in roles]
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            file.write(json.dumps({"id": f"talk-{number}", "messages": messages}) + "\n")
    convert([str(base / "talks.jsonl")], base / "converted")
    train_tokenizer(WORDS, vocab_size=2000).save_pretrained(str(base / "tokenizer"))
    for name, options in {"ism": {}, "long": {"seq_len": 512}, "prefix": {"mask": "prefix"}}.items():
        options = {"seq_len": 256, "tokenizer": str(base / "tokenizer"), "chat_template": "chatml", **options}
        pack([base / "converted"], base / name, **options)
    size = load_index(base / "ism")["tokenizer"]["vocab_size"]
    for seed, name in enumerate(["first", "second"]):
        save_model(base / name, vocab_size=size, seed=seed)
    return base


@pytest.fixture(scope="module")
def written(base):
    """An evaluation with generated answers."""
    generation = ("--generate", 5, "--max-new-tokens", 6)
    done("eval", base / "first", base / "ism", "-o", base / "e", "--resamples", 50, *generation)
    return base / "e"


def facts(folder):
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(found)
    return found


def outputs(folder):
    return [json.loads(line) for line in (folder / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_files_agree_with_each_other_and_with_the_corpus(base, written):
    found, lines = facts(written), outputs(written)
    overall = found["overall"]
    assert overall["target_tokens"] == load_index(base / "ism")["totals"]["target_tokens"]
    assert overall["nll"]["value"] == pytest.approx(
        sum(line["nll"] for line in lines) / sum(line["target_tokens"] for line in lines)
    )
    talks = [json.loads(line) for line in (base / "talks.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = {
        (talk["id"], k // 2 + 1): message["content"]
        for talk in talks
        for k, message in enumerate(talk["messages"])
        if message["role"] == "assistant"
    }
    assert {(line["conversation"], line["turn"]): line["reference"] for line in lines} == expected
    assert len(lines) == len(expected) == overall["answers"]
    assert [turn["turn"] for turn in found["by_turn"]] == sorted({turn for _, turn in expected})
    generated = {line["conversation"] for line in lines if line["generated"] is not None}
    assert len(generated) == found["generation"]["conversations"] == 5
    assert found["generation"]["answers"] == sum(line["conversation"] in generated for line in lines)
    assert "tok:13a" in found["generation"]["bleu"]["signature"]


def test_json_and_the_table_agree(base, written):
    shown = json.loads(done("eval", base / "first", base / "ism", "--resamples", 50, "--json"))
    Draft202012Validator(SCHEMA).validate(shown)
    assert shown["overall"] == facts(written)["overall"]
    table = done("eval", base / "first", base / "ism", "--resamples", 50)
    assert f"{shown['overall']['nll']['value']:,.4f}" in table
    assert f"{shown['by_turn'][1]['perplexity']['value']:,.2f}" in table


def test_the_same_model_on_another_packing_does_not_differ(base, written, tmp_path):
    options = ("--compare", written, "--resamples", 50, "--generate", 5, "--max-new-tokens", 6)
    done("eval", base / "first", base / "long", "-o", tmp_path / "e", "--batch-size", 1, *options)
    comparison = facts(tmp_path / "e")["comparison"]
    assert comparison["nll"]["value"] == pytest.approx(0, abs=1e-6)
    assert comparison["bleu"] == {"value": 0, "interval": [0, 0], "p_value": 1}
    assert facts(tmp_path / "e")["model"] == facts(written)["model"]


def test_two_models_are_compared(base, written, tmp_path):
    options = ("--compare", written, "--generate", 5, "--max-new-tokens", 6)
    table = done("eval", base / "second", base / "ism", "-o", tmp_path / "e", *options)
    found, other = facts(tmp_path / "e"), facts(written)
    difference = found["comparison"]["nll"]
    assert difference["value"] == pytest.approx(found["overall"]["nll"]["value"] - other["overall"]["nll"]["value"])
    assert difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert found["comparison"]["bleu"]["value"] == pytest.approx(
        found["generation"]["bleu"]["value"] - other["generation"]["bleu"]["value"]
    )
    assert found["model"]["weights_xxh3_128"] != other["model"]["weights_xxh3_128"]
    assert f"{difference['value']:+,.4f}" in table


def test_prefix_shards_compare_with_ism_shards(base, written, tmp_path):
    """Other shards of the same answers, as in the paper's comparison."""
    done("eval", base / "first", base / "prefix", "--mask", "prefix", "-o", tmp_path / "e", "--compare", written)
    found = facts(tmp_path / "e")
    assert found["data"]["index_sha256"] != facts(written)["data"]["index_sha256"]
    assert found["data"]["answers_sha256"] == facts(written)["data"]["answers_sha256"]
    assert found["comparison"]["by_turn"][0]["nll"]["value"] == pytest.approx(0, abs=1e-5)  # one context, one answer
    assert abs(found["comparison"]["by_turn"][1]["nll"]["value"]) > 1e-3
    assert "no generated answers" in found["comparison"]["bleu_left_out"]


def test_answers_are_paired_by_their_hashes(base, written):
    """In any order of the lines."""
    mine = read_results(written)
    shuffled = [mine.outputs[at] for at in np.random.default_rng(0).permutation(len(mine.outputs))]
    other = dataclasses.replace(mine, outputs=shuffled)
    found = compare(mine.facts, mine.outputs, other, Bootstrap(resamples=20))
    for row in (found["nll"], found["bleu"], *(each["nll"] for each in found["by_turn"])):
        assert row["value"] == pytest.approx(0, abs=1e-12)
        assert row["interval"] is None or row["interval"] == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.slow
def test_train_measures_the_same(base, tmp_path):
    """The last loss of `train --eval` equals the evaluation of the trained model."""
    options = ("--model", "tiny", "--steps", 2, "--batch-size", 2, "--learning-rate", "1e-3", "--warmup", 0)
    done("train", base / "ism", "-o", tmp_path / "m", "--eval", base / "ism", *options)
    shown = json.loads(done("eval", tmp_path / "m", base / "ism", "--resamples", 5, "--json"))
    with (tmp_path / "m" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        loss = next(float(line["eval_loss"]) for line in csv.DictReader(file) if line["eval_loss"])
    assert shown["overall"]["nll"]["value"] == pytest.approx(loss, rel=1e-5)


def test_bleu_of_other_generations_is_left_out(base, written, tmp_path):
    result = run("eval", base / "first", base / "ism", "--compare", written, "--generate", 5, "--max-new-tokens", 3)
    assert "No difference in BLEU: max new tokens is 3 here and 6 in the other" in result.stdout
    other = ("--generate", 5, "--max-new-tokens", 6, "--seed", 8)
    result = run("eval", base / "first", base / "ism", "--compare", written, *other)
    assert "No difference in BLEU" in result.stdout


# ---- errors ----


@pytest.fixture
def no_batch(monkeypatch):
    """Fail if a batch reaches the model."""
    monkeypatch.setattr(eval_pipeline, "answer_losses", lambda *args, **options: pytest.fail("a batch was evaluated"))


@pytest.mark.usefixtures("no_batch")
def test_shards_for_another_mask(base, tmp_path):
    result = run("eval", base / "first", base / "prefix", "-o", tmp_path / "e")
    refused(result, 2, f"{base / 'prefix'}: the shards were packed for the mask 'prefix'", "cannot serve 'ism'")
    refused(run("eval", base / "first", base / "ism", "--mask", "prefix"), 2, "cannot serve 'prefix'")
    assert not (tmp_path / "e").exists()


@pytest.mark.usefixtures("no_batch")
def test_a_model_without_a_mask(base, tmp_path):
    size = load_index(base / "ism")["tokenizer"]["vocab_size"]
    save_model(tmp_path / "m", vocab_size=size, mask=None)
    refused(run("eval", tmp_path / "m", base / "ism"), 2, "records no ismdata_mask", "--mask causal")
    refused(run("eval", "tiny", base / "ism"), 2, "is a preset, which has no weights")
    refused(run("eval", tmp_path / "none", base / "ism"), 1, str(tmp_path / "none"))


@pytest.mark.usefixtures("no_batch")
def test_a_model_of_another_tokenizer(base, tmp_path):
    size = load_index(base / "ism")["tokenizer"]["vocab_size"]
    save_model(tmp_path / "m", vocab_size=size)
    train_tokenizer(reversed([*WORDS, "purple", "purples"]), vocab_size=2000).save_pretrained(str(tmp_path / "m"))
    refused(run("eval", tmp_path / "m", base / "ism"), 1, "tokenizer differs from the shards'", "SHA-256")
    save_model(tmp_path / "few", vocab_size=size - 1)
    refused(run("eval", tmp_path / "few", base / "ism"), 1, f"has {size - 1} token embeddings", f"has {size} tokens")


@pytest.mark.usefixtures("no_batch")
def test_documents_longer_than_the_positions(base, tmp_path):
    size = load_index(base / "ism")["tokenizer"]["vocab_size"]
    save_model(tmp_path / "m", vocab_size=size, max_position_embeddings=32)
    refused(run("eval", tmp_path / "m", base / "ism"), 1, "the model has 32 positions")


@pytest.mark.usefixtures("no_batch")
def test_sets_with_nothing_to_measure(base, tmp_path):
    index = {key: value for key, value in load_index(base / "ism").items() if key != "sha256"}
    (tmp_path / "empty").mkdir()
    write_index(tmp_path / "empty", index | {"shards": []})
    refused(run("eval", base / "first", tmp_path / "empty"), 1, f"{tmp_path / 'empty'}: no sequences")
    write_packed(tmp_path / "untrained", [sample([[(QUERY, 5), (ANSWER, 4, False)]])])
    refused(run("eval", base / "first", tmp_path / "untrained"), 1, "no answer has targets")
    refused(run("eval", base / "first", base / "converted"), 1, "expected 'ismdata.packed/1'")


@pytest.mark.usefixtures("no_batch")
def test_evaluations_that_cannot_be_compared(base, written, tmp_path):
    def against(folder, packed="ism"):
        return run("eval", base / "first", base / packed, "--compare", folder)

    refused(against(base / "nothing"), 1, "found nothing", "`ismdata eval -o`")
    refused(against(base / "ism"), 1, "found no eval.json")
    for name, change in {
        "outputs.jsonl": lambda text: text.replace('"turn": 1', '"turn": 2', 1),
        "eval.json": lambda text: text.replace("ismdata.eval/1", "ismdata.eval/0"),
    }.items():
        (tmp_path / name).mkdir()
        for file in written.glob("*.json*"):
            text = file.read_text(encoding="utf-8")
            (tmp_path / name / file.name).write_text(change(text) if file.name == name else text, encoding="utf-8")
        refused(against(tmp_path / name), 1, "not a complete evaluation", name)


@pytest.mark.usefixtures("no_batch")
def test_evaluations_of_other_data(base, written, tmp_path):
    with (tmp_path / "half.jsonl").open("w", encoding="utf-8") as file:
        file.writelines((base / "talks.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:6])
    convert([str(tmp_path / "half.jsonl")], tmp_path / "half")
    options = {"seq_len": 256, "chat_template": "chatml"}
    pack([tmp_path / "half"], tmp_path / "packed", tokenizer=str(base / "tokenizer"), **options)
    result = run("eval", base / "first", tmp_path / "packed", "--compare", written)
    refused(
        result,
        1,
        f"{written}: evaluates other data than {tmp_path / 'packed'}",
        "answers, with the same history, are among the",
    )
    train_tokenizer(["colours", "numbers"], vocab_size=2000).save_pretrained(str(tmp_path / "tokenizer"))
    pack([base / "converted"], tmp_path / "other", tokenizer=str(tmp_path / "tokenizer"), **options)
    result = run("eval", base / "first", tmp_path / "other", "--compare", written)
    refused(result, 1, "it used another tokenizer (SHA-256")


@pytest.mark.usefixtures("no_batch")
def test_wrong_calls(base, written, monkeypatch):
    def call(*words):
        return run("eval", base / "first", base / "ism", *words)

    refused(call("--generate", -1), 2, "--generate is -1; expected 0 or more")
    refused(call("--batch-size", 0), 2, "--batch-size is 0; expected 1 or more")
    refused(call("-o", written), 2, "is in use")
    refused(call("-o", written, "--overwrite", "--compare", written), 2, "holds the input")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    refused(call("--generate", 1), 2, "pip install 'ismdata[eval]'")


def test_nothing_is_left_of_an_evaluation_that_failed(base, tmp_path):
    size = load_index(base / "ism")["tokenizer"]["vocab_size"]
    save_model(tmp_path / "m", vocab_size=size)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "m")
    refused(run("eval", tmp_path / "m", base / "ism", "-o", tmp_path / "e"), 1)
    assert not list(tmp_path.glob("*e*"))
