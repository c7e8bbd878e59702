"""What a session must know of a model: its mask, positions, end of turn and GLM tokens."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from ismdata.attention import BACKENDS, takes_two_positions
from ismdata.choices import check_mask
from ismdata.errors import UsageError
from ismdata.generate.feeding import Encoder
from ismdata.generate.sampling import EndOfTurn
from ismdata.rendering import GlmTokens


def checked_mask(model: PreTrainedModel, mask: str | None) -> str:
    """The mask to read and answer under: `mask`, or the one in the model's config. Raises UsageError."""
    names = {backend.name for backend in BACKENDS.values()}
    if getattr(model.config, "_attn_implementation", None) not in names:
        raise UsageError(
            f"{type(model).__name__} is not attached, so it would ignore the mask. Call ismdata.attach(model, mask=…) "
            "first, or load it with ismdata.attention.load"
        )
    chosen = mask if mask is not None else getattr(model.config, "ismdata_mask", None)
    if chosen is None:
        raise UsageError("the model's config records no mask; name the one it was trained under: mask='ism'")
    check_mask(chosen)
    return str(chosen)


def end_of_turn(model: PreTrainedModel, encoder: Encoder) -> EndOfTurn:
    """Where the answers of a model end: the template's end of turn, or an end of text of the model's own."""
    config = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id
    stop = () if eos is None else (eos,) if isinstance(eos, int) else eos
    return EndOfTurn(ids=tuple(encoder.end_of_turn_ids), stop=frozenset(stop) | encoder.next_turn_end_ids)


def positions_of(model: PreTrainedModel) -> int | None:
    """How many positions a model has; None where its config does not say."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def glm_tokens(model: PreTrainedModel, encoder: Encoder, mask: str) -> GlmTokens | None:
    """The tokens of the GLM layout, for a model that has it. Raises UsageError where model and encoder part."""
    if takes_two_positions(model) != (encoder.glm is not None):
        raise UsageError(
            f"{type(model).__name__} and its tokenizer's settings differ on the GLM layout: only one of them has two "
            "positions a token. Take the model and the tokenizer of one folder that `ismdata train` wrote"
        )
    return None if encoder.glm is None else replace(encoder.glm, every_answer=mask != "prefix")
