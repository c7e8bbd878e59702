"""What peft may put around an attached model.

Adapters of weights (LoRA and its like) work. Tokens and keys of peft's own do not: the intervals of a packed row do not
count them, and one prefix could not stand before each of its documents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ismdata.errors import UnsupportedModelError, UsageError

_LORA = "train adapters of weights instead (LoRA, IA3, …)"


def check_adapters(model: nn.Module) -> None:
    """Refuse what peft puts around a model and the intervals do not count, as far as the model knows of it.

    Args:
        model: The attached model, to which peft's tuners give their configuration, or peft's wrapper.

    Raises:
        UnsupportedModelError: for activated LoRA; for a wrapper with virtual tokens or keys.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{config.peft_type.value} of peft puts virtual tokens before a row, which doc_start and kv_end do not "
                f"count: {_LORA}"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                "peft's activated LoRA acts from the last invocation in a row on, whichever document it is in. Leave "
                f"alora_invocation_tokens out, or {_LORA}"
            )


def check_shape(batch: int, rows: int, doc_start: Tensor, kv_end: Tensor) -> None:
    """Raise UsageError unless the intervals are those of the call's tokens, [batch, rows]."""
    if doc_start.shape == (batch, rows) and kv_end.shape == (batch, rows):
        return
    found = f"doc_start is {list(doc_start.shape)} and kv_end {list(kv_end.shape)}; expected {[batch, rows]}"
    if rows > doc_start.shape[-1]:
        raise UsageError(
            f"{found}, the shape of the tokens: {rows - doc_start.shape[-1]} more than the batch has intervals for. "
            "Virtual tokens of peft (prompt tuning, p-tuning, CPT) stand before a row and not before each of its "
            f"documents: {_LORA}"
        )
    raise UsageError(
        f"{found}, the shape of the tokens. Turn off context and sequence parallelism, which split the tokens only"
    )


def check_counts_cache(doc_start: Tensor, kv_end: Tensor, past: int) -> None:
    """Raise UsageError unless the intervals of a call, [B, Q] each, count the `past` keys of its cache."""
    row = torch.arange(past, past + kv_end.shape[1], device=kv_end.device)
    if bool(((kv_end <= row) | (doc_start > row)).any()):
        raise UsageError(
            f"the cache has {past} keys, which doc_start and kv_end do not count: a token would not see itself. Add "
            f"{past} to them to continue a cache. Keys that peft puts before a row (prefix tuning, cartridges) stand "
            f"before one document only: {_LORA}"
        )
