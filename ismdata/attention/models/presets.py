"""Presets: models to train from scratch, with Llama's architecture and the tokenizer's vocabulary.

| preset | parameters | without embeddings |
|---|---|---|
| tiny | about 1 M (2,000 tokens) | 0.8 M |
| small | about 30 M (32,000 tokens) | 19.5 M |
| base | about 125 M (49,152 tokens) | 85 M |
| glm-tiny, glm-small | as tiny and small | |

The `glm-` presets have two rotary positions (`glm.py`), for shards in the GLM layout.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ismdata.attention.models.glm import IsmdataGlmConfig, IsmdataGlmForCausalLM
from ismdata.errors import UsageError

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "base": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}

#: The presets by name: configuration class and shape.
PRESETS: dict[str, tuple[type[LlamaConfig], dict[str, Any]]] = {
    **{name: (LlamaConfig, shape) for name, shape in _SHAPES.items()},
    **{f"glm-{name}": (IsmdataGlmConfig, _SHAPES[name]) for name in ("tiny", "small")},
}

#: The least number of positions of a preset; longer sequences raise it to their length.
MIN_POSITIONS = 8192


def preset_config(name: str, *, vocab_size: int, seq_len: int, **special_token_ids: int | None) -> LlamaConfig:
    """Build a preset's configuration.

    Args:
        name: A name in PRESETS.
        vocab_size: The tokenizer's number of tokens.
        seq_len: Tokens of the longest sequence.
        special_token_ids: `pad_token_id`, `bos_token_id`, `eos_token_id`.

    Returns:
        The configuration.

    Raises:
        UsageError: for an unknown name.

    Example:
        >>> preset_config("tiny", vocab_size=2000, seq_len=512).num_hidden_layers
        4
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    config_class, shape = PRESETS[name]
    options: dict[str, Any] = shape | special_token_ids
    return config_class(
        vocab_size=vocab_size,
        max_position_embeddings=max(MIN_POSITIONS, seq_len),
        tie_word_embeddings=True,
        **options,
    )


def preset_model(name: str, *, vocab_size: int, seq_len: int, **special_token_ids: int | None) -> PreTrainedModel:
    """Create a preset with random weights from torch's global generator.

    Args:
        name: As for `preset_config`.
        vocab_size: As for `preset_config`.
        seq_len: As for `preset_config`.
        special_token_ids: As for `preset_config`.

    Returns:
        The model in float32.

    Raises:
        UsageError: for an unknown name.
    """
    config = preset_config(name, vocab_size=vocab_size, seq_len=seq_len, **special_token_ids)
    return IsmdataGlmForCausalLM(config) if isinstance(config, IsmdataGlmConfig) else LlamaForCausalLM(config)
