"""Checks before anything runs: models and setups inside which the mask cannot work, with the reason."""

from __future__ import annotations

import inspect
import os

from accelerate.state import AcceleratorState, is_initialized
from transformers import PreTrainedModel

from ismdata.errors import UnsupportedModelError

#: Kinds of layers in which each row sees one interval of keys.
_INTERVAL_LAYERS = {"full_attention", "sliding_attention"}

_OWN_CHOICE = "which choose or merge keys by scores of their own, whatever the mask says"

#: Why layers of another kind cannot follow the mask, by a word in the kind's name.
_OTHER_LAYERS = {
    "indexed": _OWN_CHOICE,
    "sparse": _OWN_CHOICE,
    "compressed": _OWN_CHOICE,
    "chunked": "whose chunks count from the start of the row and split documents and context blocks",
    "hybrid": "which compute a convolution or a state beside their attention: it mixes documents and only looks back",
    "conv": "whose convolution mixes documents and only looks back",
}
_RECURRENT = "which carry a state from token to token: it mixes documents and cannot look ahead in a context block"


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model that cannot follow intervals.

    Args:
        model: Any model.

    Raises:
        UnsupportedModelError: with the reason.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{name} is not a transformers PreTrainedModel. Attach the model first and wrap it afterwards"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; expected a decoder. Use another model")
    config = model.config.get_text_config()
    kinds = [*(getattr(config, "layer_types", None) or []), *(getattr(config, "layers_block_type", None) or [])]
    other = sorted({kind for kind in kinds if kind not in _INTERVAL_LAYERS | {"attention"}})
    if other:
        reason = next((why for word, why in _OTHER_LAYERS.items() if word in other[0]), _RECURRENT)
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(other)}, {reason}. "
            "Expected full or sliding attention in every layer. Use another model"
        )
    if getattr(config, "attn_temperature_tuning", False):
        raise UnsupportedModelError(
            f"{name} scales its queries by their place in the row (attn_temperature_tuning), which is another one for "
            "each packed document. Set it to False in the config, or use another model"
        )
    takes_keywords = any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(model.forward).parameters.values()
    )
    if not (takes_keywords and model.is_backend_compatible()):  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(
            f"{name} does not take its attention from transformers' AttentionInterface, so it would ignore the mask. "
            "Use another model"
        )
    if model.device.type == "meta":
        raise UnsupportedModelError(
            f"{name} has no weights yet (device meta). Load them first, then attach; offload them after that"
        )


def check_parallelism() -> None:
    """Refuse accelerate's context and sequence parallelism.

    Context parallelism drops attention masks, and sequence parallelism splits the tokens but not the intervals. Both
    settings are read from the accelerator's state or, before it exists, from its environment variables.

    Raises:
        UnsupportedModelError: if accelerate is set to split sequences.
    """
    size = max(int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE") or 1) for kind in ("CP", "SP"))
    if is_initialized():
        parallelism = getattr(AcceleratorState(), "parallelism_config", None)
        size = max(size, getattr(parallelism, "cp_size", None) or 1, getattr(parallelism, "sp_size", None) or 1)
    if size > 1:
        raise UnsupportedModelError(
            f"accelerate is set to context or sequence parallelism over {size} devices, which splits sequences and "
            "drops the mask. Set cp_size and sp_size to 1; data parallelism, FSDP and tensor parallelism keep "
            "sequences whole"
        )
