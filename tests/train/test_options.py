"""Options from a TOML file and from flags: precedence and refusals."""

from __future__ import annotations

import dataclasses

import pytest
from typer.main import get_command

from ismdata.cli.main import app
from ismdata.errors import DataError, UsageError
from ismdata.train.options import TrainOptions, read_options


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def test_precedence_is_flag_file_default(config):
    path = config('model = "tiny"\nbatch-size = 8\nlearning_rate = 1e-4\nlora = true\nreport_to = ["tensorboard"]\n')
    options = read_options(path, {"batch_size": 2, "warmup": None, "report_to": ()})
    assert options == TrainOptions(
        model="tiny", batch_size=2, learning_rate=1e-4, lora=True, report_to=("tensorboard",)
    )
    assert read_options(None, {"model": "base"}) == TrainOptions(model="base")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 1e-4", r"unknown option 'lerning_rate'\. Did you mean 'learning_rate'\?"),
        (
            "optimizer = 'adam'",
            r"'optimizer'\. It is known from Axolotl, torchtune; here the optimizer is AdamW\. Remove",
        ),
        ("max_steps = 3", r"'max_steps'\. 'max_steps' of TRL, Axolotl, LLaMA-Factory is 'steps' here"),
        ("cutoff-len = 3", r"'cutoff-len'\. It is known from LLaMA-Factory; here `ismdata pack --seq-len`\. Remove"),
        ("zzzz = 3", r"'zzzz'\. Expected some of accumulation, backend, batch_size"),
        ("batch_size = 'four'", "--batch-size is 'four'; expected a whole number"),
        ("batch_size = true", "--batch-size is True; expected a whole number"),
        ("lora = 1", "--lora is 1; expected true or false"),
        ("batch_size = 2\nbatch-size = 3", "'batch_size' is set twice"),
        ("batch_size = ", "not valid TOML"),
        ("steps = nan", "--steps is nan; expected a whole number"),
    ],
)
def test_invalid_files_are_refused(config, text, message):
    with pytest.raises(DataError, match=message) as raised:
        read_options(config(text), {"model": "tiny"})
    assert "run.toml" in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "--steps is 0; expected 1 or more"),
        ({"warmup": -1}, "--warmup is -1; expected 0 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"epochs": 0}, "--epochs is 0; expected a number above 0"),
        ({"max_grad_norm": -1}, "--max-grad-norm is -1"),
        ({"precision": "float16"}, "expected one of auto, float32, bfloat16"),
        ({"loss_weighting": "turn"}, "expected one of token, answer, conversation"),
        ({"schedule": "step"}, "expected one of cosine, linear, constant"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config is given without fsdp"),
        ({"seed": 1 << 32}, "--seed is 4294967296; expected less than"),
        ({"eval_every": 5}, "--eval-every is given without --eval"),
        ({"report_to": (1,)}, r"--report-to is \[1\]; expected a list of names"),
    ],
    ids=[
        "steps",
        "warmup",
        "rate",
        "epochs",
        "norm",
        "precision",
        "weighting",
        "schedule",
        "fsdp",
        "seed",
        "eval",
        "to",
    ],
)
def test_invalid_values_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        TrainOptions(model="tiny", **fields)


def test_a_model_must_be_named(config, tmp_path):
    with pytest.raises(UsageError, match="no model given; expected --model"):
        read_options(config("steps = 3"), {})
    with pytest.raises(DataError, match="cannot be read"):
        read_options(tmp_path / "absent.toml", {"model": "tiny"})


def test_the_global_batch_decides_the_accumulation():
    options = TrainOptions(model="tiny", batch_size=2, global_batch=8)
    assert [options.batches_per_step(count) for count in (1, 2, 4)] == [(4, 8), (2, 8), (1, 8)]
    with pytest.raises(UsageError, match=r"--global-batch is 8; expected a multiple of 6"):
        options.batches_per_step(3)
    with pytest.raises(UsageError, match=r"--accumulation is 4; --global-batch 8 requires 2 on 2 processes"):
        TrainOptions(model="tiny", batch_size=2, global_batch=8, accumulation=4).batches_per_step(2)
    assert TrainOptions(model="tiny", batch_size=2, accumulation=3).batches_per_step(2) == (3, 12)
    assert TrainOptions(model="tiny").batches_per_step(2) == (1, 8)


def test_every_option_is_a_flag():
    """The command's flags and the file's keys are the same, but for tables."""
    flags = {parameter.name for parameter in get_command(app).commands["train"].params}
    keys = {field.name for field in dataclasses.fields(TrainOptions)} - {"fsdp_config"}
    assert flags - {"packed", "output", "config", "overwrite", "show_help"} == keys
