"""What generation needs to know about a model: its mask, positions, end of turn and GLM tokens."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from ismdata.attention import BACKENDS, check_adapters, takes_two_positions
from ismdata.choices import check_mask
from ismdata.errors import UsageError
from ismdata.generate.feeding import Encoder
from ismdata.generate.sampling import EndOfTurn
from ismdata.rendering import GlmTokens


def resolve_mask(model: PreTrainedModel, mask: str | None) -> str:
    """Choose the mask to run an attached model under: `mask`, or the one in its config.

    Raises:
        UsageError: If the model is not attached, or there is no such mask.
        UnsupportedModelError: If peft puts virtual tokens before its rows.
    """
    check_adapters(model)
    names = {backend.name for backend in BACKENDS.values()}
    configs = (model.config, model.config.get_text_config())  # models with several parts name it in those only
    if not names & {getattr(config, "_attn_implementation", None) for config in configs}:
        raise UsageError(
            f"{type(model).__name__} is not attached, so it would ignore the mask. Call ismdata.attach(model, mask=…) "
            "first, or load it with ismdata.attention.load"
        )
    chosen = mask if mask is not None else getattr(model.config, "ismdata_mask", None)
    if chosen is None:
        raise UsageError("the model's config records no mask. Pass the one it was trained under, as in mask='ism'")
    check_mask(chosen)
    return str(chosen)


def end_of_turn(model: PreTrainedModel, encoder: Encoder) -> EndOfTurn:
    """Find where a model's answers end: at the template's end of turn, or at the model's own end-of-text tokens.

    Args:
        model: The model.
        encoder: The encoder of its conversations.

    Returns:
        The end of turn.
    """
    config = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id
    stop = () if eos is None else (eos,) if isinstance(eos, int) else eos
    return EndOfTurn(ids=tuple(encoder.end_of_turn_ids), stop_ids=frozenset(stop) | encoder.next_turn_end_ids)


def positions_of(model: PreTrainedModel) -> int | None:
    """Read the number of positions that a model has.

    Args:
        model: The model.

    Returns:
        The number, or None if its config does not name one.
    """
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def steady_positions(model: PreTrainedModel) -> int | None:
    """Read up to how many positions the rotary angles of a model stay the same.

    Beyond `original_max_position_embeddings`, LongRoPE (Phi-3, Phi-4-mini) rotates all positions by other angles. Keys
    that were cached before are wrong then, so a conversation that is fed turn by turn must end there.

    Args:
        model: The model.

    Returns:
        The number, or None if the angles never change.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    bounds = [each.get("original_max_position_embeddings") for each in kinds if each.get("rope_type") == "longrope"]
    return min((bound for bound in bounds if bound is not None), default=None)


def glm_tokens(model: PreTrainedModel, encoder: Encoder, mask: str) -> GlmTokens | None:
    """Find the tokens of the GLM layout; None for a model with one position per token.

    Raises:
        UsageError: If only one of the model and the encoder has the GLM layout.
    """
    if takes_two_positions(model) != (encoder.glm is not None):
        raise UsageError(
            f"{type(model).__name__} and the settings of its tokenizer differ on the GLM layout: only one of them has "
            "two positions per token. Use the model and the tokenizer of one folder that `ismdata train` wrote"
        )
    return None if encoder.glm is None else replace(encoder.glm, every_answer=mask != "prefix")
