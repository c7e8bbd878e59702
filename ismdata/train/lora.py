"""Low-rank adapters (LoRA) around a model, through peft."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from ismdata.errors import UsageError
from ismdata.train.options import TrainOptions


def with_lora(model: PreTrainedModel, options: TrainOptions) -> nn.Module:
    """The attached model with low-rank adapters on all linear layers but the head; they alone are trained.

    Raises UsageError where peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"--lora needs peft ({error}). Install it: pip install 'ismdata[lora]'") from error
    # peft looks for the base model's config where it was loaded from, and a GGUF file has none beside it.
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
    alpha = 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
