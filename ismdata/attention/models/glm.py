"""A decoder with two rotary positions per token, as in ChatGLM-6B, for shards in the GLM layout.

Position 1 rotates one half of a head's dimensions, position 2 the other. All else is Llama, so masks, backends, caches,
checkpointing and training work as they do there. Importing this module registers the model type with transformers'
AutoConfig and AutoModelForCausalLM.

Shape legend: B samples, T tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from ismdata.errors import UsageError


class IsmdataGlmConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """Llama's configuration. The width of a head must be a multiple of 4, and the rotary positions unscaled."""

    model_type = "ismdata_glm"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        scaled = (self.rope_parameters or {}).get("rope_type", "default")
        if self.head_dim is None or self.head_dim % 4 or scaled != "default":
            raise ValueError(
                f"head_dim is {self.head_dim} and rope_type {scaled}; expected a multiple of 4 (each position rotates "
                "half of a head) and default"
            )


class GlmRotaryEmbedding(nn.Module):
    """Cosines and sines of two positions: ChatGLM-6B's 2D rotary embedding.

    Llama rotates dimension i together with i + D/2. Position 1 rotates the first half of these D/2 pairs and position 2
    the second, each with all the frequencies of a head of width D/2. ChatGLM-6B pairs dimensions in another order, to
    which the projections before it can adapt.
    """

    def __init__(self, config: IsmdataGlmConfig) -> None:
        super().__init__()
        assert config.head_dim is not None and config.rope_parameters is not None
        self.width = config.head_dim // 2  # dimensions that one position rotates
        self.base = cast(float, config.rope_parameters["rope_theta"])

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, position_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines, [B or 1, T, D] in x's dtype. The positions are int64[B or 1, T]."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float, device=x.device) / self.width
        frequencies = 1.0 / self.base**exponents  # float32[D / 4]
        angles = torch.cat([ids[..., None].float() * frequencies for ids in (position_ids, position_ids_2)], dim=-1)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class IsmdataGlmModel(LlamaModel):  # type: ignore[no-untyped-call]
    """The decoder without its head."""

    config_class = IsmdataGlmConfig

    def __init__(self, config: IsmdataGlmConfig) -> None:
        super().__init__(config)
        self.rotary_emb = GlmRotaryEmbedding(config)  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids_2: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Llama's. Without positions all tokens are context; one position without the other is a UsageError."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if (position_ids is None) != (position_ids_2 is None):
            raise UsageError(f"{type(self).__name__} got one of position_ids and position_ids_2. {_BOTH}")
        if position_ids is None or position_ids_2 is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids, position_ids_2 = context_positions(inputs_embeds.shape[1], past, inputs_embeds.device)
        # Position 1 is constant in answers; transformers would infer borders of packed documents from it.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None,
        )
        hidden_states = inputs_embeds
        rotations = self.rotary_emb(hidden_states, position_ids, position_ids_2)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rotations,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class IsmdataGlmForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """The decoder with its head. `forward` takes `position_ids` and `position_ids_2`, int64[B, T], beside Llama's
    arguments.
    """

    config_class = IsmdataGlmConfig

    def __init__(self, config: IsmdataGlmConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = IsmdataGlmModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


AutoConfig.register(IsmdataGlmConfig.model_type, IsmdataGlmConfig)
AutoModelForCausalLM.register(IsmdataGlmConfig, IsmdataGlmForCausalLM)

_BOTH = "Pass both, as the Collator does for shards of `ismdata pack --layout glm`"


def takes_two_positions(model: nn.Module) -> bool:
    """Tell whether a model has two positions per token.

    Args:
        model: Any model.

    Returns:
        Whether it takes `position_ids_2`.
    """
    return isinstance(model, IsmdataGlmForCausalLM)


def context_positions(tokens: int, past: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of context after `past` tokens: position 1 and position 2, int64[1, tokens] each."""
    first = torch.arange(past + 1, past + tokens + 1, device=device)[None]
    return first, torch.zeros_like(first)


def check_positions(model: nn.Module, *, position_ids: bool, position_ids_2: bool) -> None:
    """Raise UsageError unless a call has exactly the positions that the model takes.

    Args:
        model: The called model.
        position_ids: Whether the call has them.
        position_ids_2: Whether the call has them.
    """
    name = type(model).__name__
    if takes_two_positions(model):
        if not (position_ids and position_ids_2):
            raise UsageError(f"{name} got no position_ids_2, or no position_ids. {_BOTH}")
    elif position_ids_2:
        raise UsageError(
            f"{name} got position_ids_2, which it would ignore: it has one position per token. Pack the corpus "
            "without --layout glm, or use a model with two positions (--model glm-tiny)"
        )


def check_layout(model: nn.Module, name: str, *, layout: str) -> None:
    """Check that shards of this layout can train the model.

    Args:
        model: The model.
        name: What the user called it, for the message.
        layout: The shards' layout, `plain` or `glm`.

    Raises:
        UsageError: if the shards have more or fewer positions per token than the model.
    """
    if takes_two_positions(model) and layout != "glm":
        raise UsageError(
            f"--model {name} has two positions per token, and the shards have one. Pack the corpus again with "
            "--layout glm, or train another model"
        )
    if layout == "glm" and not takes_two_positions(model):
        raise UsageError(
            f"the shards have two positions per token (--layout glm), and --model {name} would ignore the second. "
            "Train glm-tiny or glm-small, or pack the corpus again without --layout glm"
        )
