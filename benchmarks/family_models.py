"""Tiny random models of every causal family of transformers, for families.py.

A tiny configuration keeps what makes a family differ: every kind of layer that its own default has, windows shorter
than the input, grouped heads, several experts, biases, dropout, and scales other than one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS, WINDOW = 61, 4, 9

#: What any configuration is shrunk to, by the name of its field. Names that it does not have are left out.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sep_token_id": None,
    "cls_token_id": None,
    "eod_token_id": None,
    "sliding_window": WINDOW,
    "local_attention": 2 * (WINDOW - 1),
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_chunk_size": 24,
    "is_decoder": True,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "embedding_size": 24,
    "word_embed_proj_dim": 24,
    "ffn_dim": 48,
    "dff": 48,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "prefix_dense_intermediate_size": 32,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "router_hidden_size": 16,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": None,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 6,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    # what the sizes of language models would make slow, or what a tiny model does not reach
    "keep_window_size": 8,
    "floor_scale": 8,
    "query_pre_attn_scalar": 20,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "lambda_std_dev": 0.3,
    "kv_channels": 8,
    "dim_model_base": 16,
    "rotary_dim": 8,
    "gated_norm_rank": 4,
    "pronunciation_embed_dim": 8,
    "pronunciation_vocab_size": VOCABULARY,
    "shape_embed_dim": 8,
    "shape_vocab_size": VOCABULARY,
    "audio_vocab_size": 32,
    "backbone_hidden_size": 32,
    "num_centroids": 8,
    "centroid_intermediate_top_k": 2,
    "lru_width": 32,
    "attention_window_size": WINDOW,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.3,
    "logit_scale": 0.4,
    "final_logit_softcapping": 5.0,
    "attention_bias": True,
    "mlp_bias": True,
    "enable_bias": True,
    "use_bias": True,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "layerdrop": 0.0,
}

#: Fields of one family, after `_SIZES`.
_MLA = {"num_key_value_heads": 4}
_KINDS_FROM_WINDOWS = {"layer_types": None}
_MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots3_note_text": _MLA,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "kimi_linear": _MLA,
    "longcat_flash": _MLA | {"num_layers": 2},
    "minicpm3": _MLA,
    "youtu": _MLA,
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 1, "eos_token_id": 1},
    "dots1": _KINDS_FROM_WINDOWS,
    "qwen2": _KINDS_FROM_WINDOWS,
    "qwen2_moe": _KINDS_FROM_WINDOWS,
    "qwen3": _KINDS_FROM_WINDOWS,
    "smollm3": _KINDS_FROM_WINDOWS | {"no_rope_layers": [1, 0, 1, 1], "max_window_layers": 2},
    "laguna": _MIXED | {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "mellum": _MIXED | {"mlp_layer_types": ["dense", "sparse"] * 2},
    "kolibri1": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "diffllama": {"attention_dropout": 0.0},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "falcon_h1": {"mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "xmod": {"default_language": "en_XX"},
    "gpt_bigcode": {"multi_query": True},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo": {"clip_qkv": 0.7},
    "olmoe": {"clip_qkv": 0.7},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "phi3": {"original_max_position_embeddings": 512},
    "phi4_multimodal": {"original_max_position_embeddings": 512},
}

#: Families in another setting, by a name that says which: what some checkpoints have, or what must be refused.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": ["full_attention"] * LAYERS}),
    "hrm_text, causal": ("hrm_text", {"prefix_lm": False}),
    "lfm2, attention only": ("lfm2", {"layer_types": ["full_attention"] * LAYERS}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama4_text, no chunks": ("llama4_text", {"layer_types": ["full_attention"] * LAYERS}),
    "llama4_text, no chunks, no temperature": (
        "llama4_text",
        {"layer_types": ["full_attention"] * LAYERS, "attn_temperature_tuning": False},
    ),
    "minimax, attention only": ("minimax", {"layer_types": ["full_attention"] * LAYERS}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "opt, norm after": ("opt", {"do_layer_norm_before": False}),
    "phi, norms of queries": ("phi", {"qk_layernorm": True}),
    "phimoe, no window": ("phimoe", {"sliding_window": None}),
    "qwen2_moe, no window": ("qwen2_moe", {"use_sliding_window": False}),
    "qwen3, no window": ("qwen3", {"use_sliding_window": False}),
}


#: Fields that are rates of dropout of attention weights.
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")

#: What the parts for images and sound are shrunk to, which no check runs.
_OTHER_PARTS: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_blocks", "depth", "encoder_layers"), 1),
    "mlp_layer_types": ["dense"],
    "adapter_out_dim": 32,
}


def model_types() -> list[str]:
    """Every model type that AutoModelForCausalLM knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that AutoModelForCausalLM makes of a model type."""
    found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return found


class Rates(NamedTuple):
    """Rates of dropout: of attention weights, and of everything else."""

    attention: float
    others: float


DROPS = Rates(0.1, 0.1)


def tiny_config(model_type: str, rates: Rates = DROPS, **changes: Any) -> PreTrainedConfig:
    """A family's configuration in small."""
    return _shrunk(CONFIG_MAPPING[model_type], rates, changes)


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float64, rates: Rates = DROPS, **changes: Any
) -> PreTrainedModel:
    """A family's model in small, with random weights in every parameter, in evaluation mode.

    Args:
        model_type: One of `model_types()`.
        dtype: Of the weights. In float64 the experts are computed individually: grouped products need float32.
        rates: Of dropout, where the family has it.
        changes: Fields of the configuration.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type, rates, **changes)
    if dtype == torch.float64:
        config._experts_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _randomize(model)
    return model.to(dtype).eval()


def _shrunk(config_class: type[PreTrainedConfig], rates: Rates, changes: dict[str, Any]) -> PreTrainedConfig:
    own = _OWN.get(config_class.model_type, {}) | changes
    names = {each.name for each in dataclasses.fields(config_class)}
    aliases = config_class.attribute_map
    sizes = {aliases.get(name, name): value for name, value in _SIZES.items()}
    chosen = {name: value for name, value in sizes.items() if name in names}
    for name in names:
        if _is_dropout(name, config_class):
            chosen[name] = rates.attention if name in _ATTENTION_DROPOUT else rates.others
    kinds = _layer_kinds(config_class)
    if kinds and "layer_types" in names:
        chosen["layer_types"] = kinds
    if "text_config" in names and "text_config" in config_class.sub_configs:
        text = config_class().get_text_config()
        chosen["text_config"] = _shrunk(type(text), rates, {}).to_dict()
    for name, kind in config_class.sub_configs.items():
        if config_class.model_type == "blt" and name in names:
            chosen[name] = _shrunk(kind, rates, {}).to_dict()
        elif name not in ("text_config", "attn_config", "ffn_config") and name in names:
            known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
            chosen[name] = {each: value for each, value in _OTHER_PARTS.items() if each in known}
    return config_class(**chosen | own)


def _is_dropout(name: str, config_class: type[PreTrainedConfig]) -> bool:
    """Whether a field is a rate of dropout inside the decoder, not one of a classifier's head."""
    default = getattr(config_class, name, None)
    named = ("dropout" in name or name.endswith("pdrop")) and not name.startswith(("summary", "classifier"))
    return named and isinstance(default, float)


def _layer_kinds(config_class: type[PreTrainedConfig]) -> list[str]:
    """LAYERS kinds, so that each kind that the family's default has is there."""
    kinds = getattr(config_class().get_text_config(), "layer_types", None) or []
    distinct = sorted(set(kinds))
    return [distinct[place % len(distinct)] for place in range(LAYERS)] if distinct else []


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Replace parameters that begin as constants (biases, norms, sinks), which would hide what they do."""
    for parameter in model.parameters():
        if not parameter.isfinite().all():
            parameter.normal_(std=0.2)  # created empty
        elif parameter.numel() and float(parameter.max()) == float(parameter.min()):
            parameter.add_(0.2 * torch.randn_like(parameter))
