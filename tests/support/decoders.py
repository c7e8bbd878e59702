"""Tiny decoders of several families, and the stock model under an explicit mask as the oracle."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from ismdata import masks
from ismdata.attention.attachment import detach
from tests.support.tiny import SIZES

WINDOW = 9
HEADS = {**SIZES, "head_dim": 8}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**HEADS),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "gemma3": lambda: Gemma3TextConfig(
        **HEADS, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**SIZES, sliding_window=WINDOW),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}),
}
#: Soft-capped scores, which only flex supports.
GEMMA2 = lambda: Gemma2Config(  # noqa: E731
    **HEADS,
    sliding_window=WINDOW,
    attn_logit_softcapping=2.0,
    layer_types=["sliding_attention", "full_attention"],
)


def decoder(name, *, dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[name]() if name in CONFIGS else GEMMA2()
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def stock_forward(model, batch):
    """The oracle: a copy of the model under stock eager attention and an explicit additive mask.

    Returns the copy (to differentiate) and its logits.
    """
    oracle = copy.deepcopy(model)
    detach(oracle)
    oracle.set_attn_implementation("eager")
    sees = torch.from_numpy(masks.dense(batch["doc_start"], batch["kv_end"]))[:, None]
    row, key = torch.arange(sees.shape[2])[:, None], torch.arange(sees.shape[3])
    near = row - key < WINDOW  # the last WINDOW keys, the row's own included, and all keys ahead

    def additive(visible):
        return torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)

    full, sliding = additive(sees), additive(sees & near)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        mask = {"full_attention": full, "sliding_attention": sliding}
    else:
        mask = full if getattr(model.config, "sliding_window", None) is None else sliding
    output = oracle(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
    )
    return oracle, output.logits
