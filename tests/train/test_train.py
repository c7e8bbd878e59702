"""Training on small shards: that it learns, what it writes, what it counts, what it refuses before it starts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config

from ismdata.attention import attachment as attention
from ismdata.attention import model_folder
from ismdata.attention.models import loading as base_model
from ismdata.attention.models.presets import PRESETS, preset_model
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.data.index import write_index
from ismdata.errors import DataError, UnsupportedModelError, UsageError
from ismdata.masks import IGNORE_INDEX
from ismdata.train.metrics import METRICS
from tests.support.reporters import Recorder
from tests.support.tiny import ANSWER, CONFIGS, QUERY, SIZES, VOCABULARY, sample, tiny_model, write_packed
from tests.support.training_shards import copying_rows, run, saved_model, weights, word_tokenizer

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = write_packed(tmp_path_factory.mktemp("data") / "packed", copying_rows(16))
    word_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return Path(saved_model(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory):
    """The output, report and reporter of one run of the tiny preset."""
    output = tmp_path_factory.mktemp("trained") / "model"
    reporter = Recorder()
    options = {"model": "tiny", "steps": 40, "learning_rate": 3e-3, "warmup": 5, "save_every": 25}
    report = run(packed, output, reporter=reporter, **options)
    return output, report, reporter


def test_it_learns(trained):
    _, report, _ = trained
    assert report.steps == 40
    assert report.first_loss > 3.0  # log(61) = 4.1 at the start
    assert report.last_loss < 0.75 * report.first_loss


def test_what_the_folder_holds(trained, packed):
    output, report, _ = trained
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.csv", "checkpoints", "tokenizer.json"} <= names
    assert {"README.md", "run.json", "generation_config.json", "curves.png"} <= names
    assert not any(path.suffix in {".bin", ".pt", ".pth"} for path in output.iterdir())
    assert json.loads((output / "config.json").read_text())["ismdata_mask"] == "ism"
    for file in (packed / "tokenizer").iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert len(AutoTokenizer.from_pretrained(output)) == VOCABULARY
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"checkpoint-25", "checkpoint-40"}
    assert report.output == output
    assert not list(output.parent.glob(".*"))
    assert len({path.stat().st_mode for path in output.iterdir() if path.is_file()}) == 1  # who reads one reads all


def test_metrics_and_lines(trained, packed):
    output, report, reporter = trained
    with (output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == METRICS
    assert [int(row["step"]) for row in rows] == [1, 10, 20, 30, 40]
    assert all(float(row[name]) > 0 for row in rows for name in ("loss", "grad_norm", "seconds"))
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[0] == 0  # the warm-up starts at 0
    assert 3e-3 > rates[1] > rates[-1] > 0
    assert float(rows[0]["loss"]) == report.first_loss
    # 40 steps x 4 rows x 6 documents of 18 tokens; 10 targets each.
    assert (int(rows[-1]["tokens"]), int(rows[-1]["target_tokens"])) == (40 * 4 * 108, 40 * 4 * 60)
    assert (report.tokens, report.target_tokens) == (40 * 4 * 108, 40 * 4 * 60)
    lines = ["attention backend: sdpa on cpu", *(f"step {step}/40" for step in (1, 10, 20, 30, 40))]
    assert [line.split("  ")[0] for line in reporter.notes] == lines
    assert [each for each in reporter.steps if each[0] == "train"] == [("train", step, 40) for step in range(41)]
    assert max(map(len, reporter.notes)) <= 80


def test_the_saved_model_is_the_trained_one_with_its_mask(trained, packed):
    output, report, _ = trained
    model = model_folder.load(output)
    assert model.config.ismdata_mask == "ism"
    dataset = PackedDataset(packed)
    with torch.no_grad():
        loss = float(model(**Collator()([dataset[row] for row in range(8)])).loss)
    assert loss < 1.1 * report.last_loss
    assert sum(parameter.numel() for parameter in model.parameters()) == report.parameters


def test_the_same_seed_gives_the_same_weights(packed, small_model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(packed, tmp_path / name, model="tiny", seed=seed, steps=2)
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_loss_is_one_mean_over_all_targets_of_a_step(small_model, tmp_path):
    """For rows with very different numbers of targets, the split into micro-batches changes nothing."""
    rows = copying_rows(2) + [sample([[(QUERY, 100), (ANSWER, 2)]], seed=seed) for seed in range(2)]
    folder = write_packed(tmp_path / "packed", rows)
    word_tokenizer(folder / "tokenizer")
    whole = run(folder, tmp_path / "whole", model=str(small_model), batch_size=4, log_every=1)
    parts = run(folder, tmp_path / "parts", model=str(small_model), batch_size=1, accumulation=4, log_every=1)
    batch = Collator()(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = attention.attach(tiny_model(dtype=torch.float32))(**batch).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    assert whole.first_loss == pytest.approx(float(losses), rel=1e-4)
    assert parts.first_loss == pytest.approx(float(losses), rel=1e-4)
    assert whole.target_tokens == parts.target_tokens == 2 * 60 + 2 * 2
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-5)


def test_weights_reach_the_loss(small_model, tmp_path):
    """Shards whose targets all have weight 0.5 have half the loss."""
    losses = {}
    for weight in (1.0, 0.5):
        rows = copying_rows(4, loss_weight=np.full(128, weight, np.float32))
        folder = write_packed(tmp_path / f"packed{weight}", rows)
        word_tokenizer(folder / "tokenizer")
        report = run(folder, tmp_path / f"model{weight}", model=str(small_model), log_every=1)
        losses[weight] = report.first_loss
    assert losses[0.5] == pytest.approx(0.5 * losses[1.0], rel=1e-4)


def test_another_mask_than_the_shards(packed, small_model, tmp_path):
    ism = run(packed, tmp_path / "ism", model=str(small_model), log_every=1)
    causal = run(packed, tmp_path / "causal", model=str(small_model), mask="causal", log_every=1)
    assert (ism.mask, causal.mask) == ("ism", "causal")
    assert json.loads((tmp_path / "causal" / "config.json").read_text())["ismdata_mask"] == "causal"
    assert abs(ism.first_loss - causal.first_loss) > 1e-3
    with pytest.raises(UsageError, match="Pack the corpus again with --mask prefix"):
        run(packed, tmp_path / "prefix", model=str(small_model), mask="prefix")
    assert not (tmp_path / "prefix").exists()


def test_the_last_steps_are_logged_too(packed, small_model, tmp_path):
    run(packed, tmp_path / "model", model=str(small_model), steps=5, log_every=3)
    rows = (tmp_path / "model" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "3", "5"]


def test_epochs_count_the_sequences(packed, small_model, tmp_path):
    report = run(packed, tmp_path / "model", model=str(small_model), steps=None, epochs=1.5, batch_size=4)
    assert report.steps == 6  # 16 sequences, four at a time, one and a half times


def test_an_output_in_use_is_refused_unless_overwritten(packed, small_model, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"model: is in use.*--overwrite"):
        run(packed, output, model=str(small_model))
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match=r"no output of this command"):
        run(packed, output, model=str(small_model), overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    run(packed, output, model=str(small_model))
    (output / "older").touch()
    run(packed, output, model=str(small_model), overwrite=True)
    assert not (output / "older").exists()
    assert (output / "model.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(packed, tmp_path / "file", model=str(small_model), overwrite=True)


REFUSED = {
    "an unknown model": ({"model": "no/such/folder"}, DataError, "no such file or folder.*tiny, small, base"),
    "a missing GGUF file": ({"model": "absent.gguf"}, DataError, "no such file; expected a GGUF file"),
    "no steps": ({"model": "tiny", "steps": 0}, UsageError, "--steps is 0; expected 1 or more"),
    "no batch": ({"model": "tiny", "batch_size": 0}, UsageError, "--batch-size is 0"),
    "no epochs": ({"model": "tiny", "steps": None, "epochs": 0.0}, UsageError, "--epochs is 0.0"),
    "an unknown mask": ({"model": "tiny", "mask": "full"}, UsageError, "mask is 'full'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, packed, tmp_path):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(packed, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_the_shards_are_refused(packed, tmp_path):
    def saved(name, **changes):
        config = CONFIGS["llama"]()
        for key, value in changes.items():
            setattr(config, key, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    with pytest.raises(DataError, match=r"has 40 token embeddings; the shards' tokenizer has 61"):
        run(packed, tmp_path / "out", model=saved("few", vocab_size=40))
    with pytest.raises(DataError, match=r"has 16 positions; the longest document has 18 tokens"):
        run(packed, tmp_path / "out", model=saved("short", max_position_embeddings=16))
    torch.manual_seed(0)
    mixed = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    AutoModelForCausalLM.from_config(mixed).save_pretrained(tmp_path / "mixed")
    with pytest.raises(UnsupportedModelError, match="layers of kind conv"):
        run(packed, tmp_path / "out", model=str(tmp_path / "mixed"))
    run(packed, tmp_path / "out", model=saved("long enough", max_position_embeddings=18))


def test_weights_as_pickles_are_refused(packed, small_model, tmp_path):
    model = tmp_path / "pickled"
    model.mkdir()
    (model / "config.json").write_text((small_model / "config.json").read_text())
    torch.save(tiny_model(dtype=torch.float32).state_dict(), model / "pytorch_model.bin")
    match = r"the weights are a pickle \(pytorch_model\.bin\).*expected model\.safetensors"
    with pytest.raises(DataError, match=match):
        run(packed, tmp_path / "out", model=str(model))


def test_shards_that_cannot_be_trained_on_are_refused(packed, tmp_path):
    without = write_packed(tmp_path / "without", copying_rows(1))
    with pytest.raises(DataError, match=r"tokenizer: no tokenizer files"):
        run(without, tmp_path / "out", model="tiny")
    index = json.loads((without / "index.json").read_text()) | {"shards": []}
    write_index(without, index)
    with pytest.raises(DataError, match="no sequences"):
        run(without, tmp_path / "out", model="tiny")


def write_gguf(path, model):
    """A Llama model as a GGUF file, in float32."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{long}" for short, long in parts.items()}
        for short, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            weight = weights[f"model.layers.{layer}.self_attn.{short}_proj.weight"]
            # llama.cpp rotates adjacent pairs of dimensions, transformers the two halves of a head.
            paired = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.attn_{short}.weight", paired.numpy())
    for short, long in names.items():
        writer.add_tensor(f"{short}.weight", weights[f"{long}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_trained_like_the_model_it_holds(packed, small_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model(dtype=torch.float32))
    folder = run(packed, tmp_path / "folder", model=str(small_model), log_every=1)
    file = run(packed, tmp_path / "file", model=str(tmp_path / "model.gguf"), log_every=1)
    assert file.first_loss == pytest.approx(folder.first_loss, rel=1e-5)
    config = json.loads((tmp_path / "file" / "config.json").read_text())
    assert config["ismdata_mask"] == "ism"
    assert "quantization_config" not in config
    assert model_folder.load(tmp_path / "file").dtype == torch.float32


def test_a_missing_gguf_package_is_named(packed, tmp_path, monkeypatch):
    def without_gguf(*args, **kwargs):
        raise ImportError("loading a GGUF checkpoint requires gguf>=0.10")

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", without_gguf)
    with pytest.raises(DataError, match=r"requires gguf.*pip install gguf"):
        run(packed, tmp_path / "out", model=str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"), [("tiny", 2000, 1), ("small", 32000, 30), ("base", 49152, 125)]
)
def test_preset_sizes(name, vocab_size, millions):
    with torch.device("meta"):
        model = preset_model(name, vocab_size=vocab_size, seq_len=16384)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.1)
    assert model.config.max_position_embeddings == 16384
    assert set(PRESETS) == {"tiny", "small", "base", "glm-tiny", "glm-small"}
    with pytest.raises(UsageError, match="unknown preset 'huge'; expected one of tiny, small, base"):
        preset_model("huge", vocab_size=10, seq_len=128)


def test_the_backend_is_an_option_and_changes_nothing(packed, small_model, tmp_path):
    def trained_with(backend):
        return run(packed, tmp_path / backend, model=str(small_model), steps=3, warmup=20, backend=backend)

    dense, varlen = trained_with("sdpa"), trained_with("varlen")
    assert (dense.backend, varlen.backend) == ("sdpa", "varlen")
    assert varlen.last_loss == pytest.approx(dense.last_loss, rel=1e-5)
    with pytest.raises(UsageError, match="backend flex cannot train on cpu"):
        trained_with("flex")
    assert not (tmp_path / "flex").exists()
    with pytest.raises(UsageError, match="--backend is 'dense'; expected one of auto, sdpa, flex, varlen"):
        trained_with("dense")
