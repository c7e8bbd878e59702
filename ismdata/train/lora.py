"""Low-rank adapters (LoRA) around a model, through peft."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from ismdata.errors import UsageError
from ismdata.train.options import TrainOptions


def with_lora(model: PreTrainedModel, options: TrainOptions) -> nn.Module:
    """Add low-rank adapters to all linear layers but the output head. Only the adapters are trained.

    Args:
        model: The attached model.
        options: Of these, `lora_rank` and `lora_alpha`.

    Returns:
        The model inside peft's wrapper.

    Raises:
        UsageError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"--lora requires peft ({error}). Install it: pip install 'ismdata[lora]'") from error
    # peft looks for config.json in the folder that the base model was loaded from; a GGUF file's folder has none.
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
    alpha = 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted
