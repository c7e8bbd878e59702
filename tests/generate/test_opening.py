"""Opening a chat with all that holds a model, and what is said about the rest."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ismdata.attention import attachment as attention
from ismdata.attention import model_folder
from ismdata.errors import DataError, UnsupportedModelError, UsageError
from ismdata.generate.opening import open_chat, recorded_mask
from ismdata.rendering.encoding import SETTINGS_NAME
from tests.generate.test_terminal import terminal
from tests.support.reporters import Recorder
from tests.support.scripted import CharacterEncoder
from tests.support.tiny import tiny_model
from tests.train.test_train import write_gguf


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, smollm2):
    """A small saved model with a real tokenizer, without the settings file of ismdata."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def record(folder, mask):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ismdata_mask": mask}))


@pytest.mark.slow
def test_opening_a_model(folder):
    with pytest.raises(UsageError, match=r"config records no ismdata_mask.*--mask causal"):
        open_chat(folder)
    assert not (folder / SETTINGS_NAME).exists()
    session = open_chat(folder, mask="causal", max_new_tokens=3)  # with its tokenizer's own template
    assert session.mask == "causal"
    assert len(session.fed) == 0
    session.reply("Hello")
    assert session.encoder.decode(session.fed).startswith("<|im_start|>")
    record(folder, "ism")
    assert open_chat(folder).mask == "ism"
    assert open_chat(folder, mask="prefix").mask == "prefix"


def test_an_unknown_mask(folder):
    record(folder, "slanted")
    with pytest.raises(DataError, match=r"config.json: ismdata_mask is 'slanted'; expected one of ism, causal, prefix"):
        open_chat(folder)
    assert open_chat(folder, mask="ism").mask == "ism"


def test_a_question_longer_than_the_models_positions(folder):
    session = open_chat(folder, mask="ism")
    shown = terminal(session, ["word " * 100])
    assert "would have" in shown
    assert "the model has 64 positions, which must hold the answer too. Say less" in shown
    assert session.messages == []


@pytest.mark.slow
def test_the_command_line(folder):
    from typer.testing import CliRunner

    from ismdata.cli.main import app

    def run(*options, lines=""):
        return CliRunner().invoke(app, ["chat", str(folder), *options], input=lines)

    assert run().exit_code == 2
    record(folder, "ism")
    done = run("--max-new-tokens", "2", "--when-full", "drop-oldest", "--context", "60", lines="Hi\n/undo\n\n/exit\n")
    assert done.exit_code == 0, done.output
    assert "Mask ism. /help" in done.output
    assert "Removed 'Hi'" in done.stderr
    assert done.stdout.count("\n") == done.stdout.rstrip().count("\n") + 1
    assert not {"Mask", "Removed", "> "} & set(done.stdout.split(" "))
    assert run(lines="/quit\nHi\n").exit_code == 1  # the question was answered, and a line ended in an error
    other = run("--mask", "causal", "--top-k", "3", "--min-p", "0.1", "--repetition-penalty", "1.1", lines="")
    assert "Mask causal (the model was trained under ism)" in other.output
    refused = run("--context", "65")
    assert refused.exit_code == 2
    assert "--context is 65; expected at most the model's 64 positions" in refused.output
    record(folder, "slanted")
    assert run().exit_code == 1


def test_a_python_session_with_a_tokenizer_of_transformers(folder):
    from transformers import AutoTokenizer

    import ismdata

    model = model_folder.load(folder, mask="ism")
    session = ismdata.Session(model.eval(), AutoTokenizer.from_pretrained(folder), max_new_tokens=3)
    pieces = list(session.ask("Hello"))
    assert "".join(pieces) == session.messages[-1]["content"]
    assert open_chat(folder, mask="ism", max_new_tokens=3).reply("Hello") == "".join(pieces)
    assert attention.detach(model) is None
    with pytest.raises(UsageError, match="not attached"):
        ismdata.Session(tiny_model(), CharacterEncoder())


def test_what_is_taken_is_reported(folder):
    reporter = Recorder()
    open_chat(folder, mask="ism", reporter=reporter)
    assert reporter.notes == ["attention backend: sdpa on cpu"]


def without_template(folder):
    """As a base model's folder: a tokenizer without a chat template."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))


def test_a_tokenizer_without_a_template(folder, tmp_path):
    without_template(folder)
    reporter = Recorder()
    session = open_chat(folder, mask="ism", max_new_tokens=2, reporter=reporter)
    assert (
        "has no chat template: the built-in chatml is used. Name another one with --chat-template" in reporter.notes[0]
    )
    session.reply("Hello")
    assert session.encoder.decode(session.fed).startswith("<|im_start|>user")
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    reporter = Recorder()
    session = open_chat(folder, mask="ism", max_new_tokens=2, chat_template=str(own), reporter=reporter)
    session.reply("Hello")
    assert session.encoder.decode(session.fed).startswith("[user] Hello")
    assert reporter.notes == ["attention backend: sdpa on cpu"]
    session.encoder.encoding.save(folder)
    with pytest.raises(UsageError, match=r"--chat-template own: .* was trained with the template in its folder"):
        open_chat(folder, mask="ism", chat_template="own")


def write_index(folder, kind):
    (folder / "index.json").write_text(json.dumps({"format": kind}))


WRONG = {
    "a preset": (
        lambda folder: "tiny",
        UsageError,
        r"^tiny: is a preset, which has no weights. Train it first: ismdata",
    ),
    "a packed folder": (
        lambda folder: write_index(folder, "ismdata.packed/1"),
        DataError,
        r"it is a packed folder. Train a model on it: ismdata train .* --model tiny -o model",
    ),
    "a converted folder": (
        lambda folder: write_index(folder, "ismdata.conversations/1"),
        DataError,
        r"it is a converted folder. Pack it, then train: ismdata pack",
    ),
    "a folder of a GGUF file": (
        lambda folder: (folder / "q4.gguf").write_bytes(b""),
        DataError,
        r"it has q4.gguf. Name the file: .*q4.gguf",
    ),
    "a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        DataError,
        "it is a tokenizer. Expected",
    ),
    "an empty folder": (lambda folder: None, DataError, r"no config.json; expected a model folder"),
    "a broken index": (lambda folder: (folder / "index.json").write_text("["), DataError, r"expected a model folder"),
    "a missing GGUF file": (
        lambda folder: folder / "none.gguf",
        DataError,
        r"none.gguf: no such file; expected a GGUF",
    ),
    "a file": (
        lambda folder: shutil.copy(__file__, folder / "config.json"),
        DataError,
        r"config.json: a file; expected a preset, a model folder, a .gguf file or a hub name",
    ),
    "adapters without a base": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": null}'),
        DataError,
        r"base_model_name_or_path is None, which is no model here",
    ),
    "adapters of a base that is gone": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base"}'),
        DataError,
        r"base_model_name_or_path is '/gone/base', which is no model here.*Write the base model's path there",
    ),
    "broken adapters": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        DataError,
        r"adapter_config.json: cannot be read",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_model_is_named_before_anything_is_loaded(what, tmp_path):
    make, error, message = WRONG[what]
    made = make(tmp_path)
    name = made if what in ("a preset", "a missing GGUF file", "a file") else tmp_path
    with pytest.raises(error, match=message):
        open_chat(name)


def test_a_model_without_a_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()
    with pytest.raises(
        DataError, match=r"a model without a tokenizer. Copy the one .*: cp PACKED/tokenizer/\* .*/model/"
    ):
        open_chat(folder, mask="ism")


def test_weights_that_lack_a_parameter(folder):
    """transformers would make it up, and only log that."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 parameters of a LlamaForCausalLM \(model.layers.0.mlp.up_proj.weight"):
        open_chat(folder, mask="ism")


def test_a_tokenizer_larger_than_the_model(folder):
    small = tiny_model(dtype=torch.float32)
    small.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"the model has 61 token embeddings; its tokenizer has \d+ tokens"):
        open_chat(folder, mask="ism")


def test_a_gguf_file_is_loaded_in_the_dtype_asked_for(tmp_path):
    """Its tokenizer is read as `pack` reads it (`load_encoding`)."""
    stock = tiny_model(dtype=torch.float32)
    write_gguf(tmp_path / "model.gguf", stock)
    ids, ends = torch.arange(2, 9)[None], torch.full((1, 7), 7)
    given = {"input_ids": ids, "doc_start": torch.zeros_like(ends), "kv_end": ends}
    loaded = model_folder.load(tmp_path / "model.gguf", mask="ism", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, attention.attach(stock)(**given).logits, rtol=0, atol=1e-4)
    assert model_folder.load(tmp_path / "model.gguf", mask="ism", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.fixture
def adapters(folder, tmp_path):
    """LoRA around the saved model, not zero, in a folder of its own."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapters")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        shutil.copy(path, tmp_path / "merged")
    return tmp_path / "adapters"


def test_adapters_answer_as_the_merged_model(adapters):
    """The tokenizer is that of the base model."""
    ours = open_chat(adapters, mask="ism", max_new_tokens=8)
    merged = open_chat(adapters.parent / "merged", mask="ism", max_new_tokens=8)
    base = open_chat(adapters.parent / "model", mask="ism", max_new_tokens=8)
    assert ours.reply("Hello") == merged.reply("Hello") != base.reply("Hello")


def test_adapters_inside_the_model_that_has_them_merged(adapters):
    """As `ismdata train --lora` writes them: template and mask are those of the folder around."""
    outer = adapters.parent / "merged"
    open_chat(outer, mask="ism").encoder.encoding.save(outer)
    record(outer, "ism")
    inner = shutil.move(adapters, outer / "adapter")
    session = open_chat(inner, max_new_tokens=8)
    assert (session.mask, recorded_mask(inner)) == ("ism", "ism")
    assert session.reply("Hello") == open_chat(outer, max_new_tokens=8).reply("Hello")
    gone = json.loads((inner / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (inner / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(DataError, match=r"is the model with these adapters merged: name it, or write the base model's"):
        open_chat(inner)


@pytest.mark.parametrize("damage", ["weights", "a missing weight", "shapes", "pickle", "prompt tuning"])
def test_adapters_that_cannot_be_merged(adapters, damage):
    config = json.loads((adapters / "adapter_config.json").read_text())
    error, message = DataError, r"adapters: not adapters of .*Train them again, or name their base"
    if damage == "weights":
        (adapters / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    elif damage == "a missing weight":
        weights = load_file(adapters / "adapter_model.safetensors")
        weights.pop(next(iter(weights)))
        save_file(weights, adapters / "adapter_model.safetensors")
        message = r"not adapters of .*missing adapter keys"
    elif damage == "shapes":
        config["r"] = 5
    elif damage == "pickle":
        (adapters / "adapter_model.safetensors").rename(adapters / "adapter_model.bin")
        message = r"the weights are a pickle \(adapter_model.bin\)"
    else:
        kept = {"base_model_name_or_path": config["base_model_name_or_path"], "task_type": "CAUSAL_LM"}
        config = {**kept, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
        error, message = UnsupportedModelError, r"PROMPT_TUNING of peft puts virtual tokens before a row"
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        open_chat(adapters, mask="ism")
