"""`generate` of an attached model: transformers' own loop, with the intervals of each of its calls.

transformers prepares each forward of `generate` with `prepare_inputs_for_generation`. An attached model has
`PrepareInputs` in its place, which adds `doc_start` and `kv_end`: for the prompt those of the caller, and `t + 1` for
each token t after it. So whole context blocks are prefilled as the mask wants, and what follows is decoded as usual.

Under `causal` a prompt needs no more than its tokens. Under `ism` and `prefix` tokens see what follows them in their
context, and tokens alone do not say where contexts end: the caller passes `kv_end`, or `generate` is refused.

Shape legend: B rows of the batch, L tokens of the prompt, Q tokens of the call, K = tokens in the cache + Q.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ismdata.attention.models.glm import takes_two_positions
from ismdata.errors import UsageError

#: The method of transformers that `PrepareInputs` stands in for.
_METHOD = "prepare_inputs_for_generation"


class PrepareInputs:
    """Stands in for `prepare_inputs_for_generation` of an attached model.

    It holds its model weakly, so that a model is freed as soon as nothing else refers to it. Copies of the model get
    their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return PrepareInputs, (self._model(),)

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own parameters and `kv_end`: `generate` refuses keywords that are not among them."""
        own = inspect.signature(getattr(type(self._model()), _METHOD))
        parameters = [each for each in own.parameters.values() if each.name != "self"]
        place = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        parameters.insert(place, inspect.Parameter("kv_end", inspect.Parameter.KEYWORD_ONLY, default=None))
        return own.replace(parameters=parameters)

    def __call__(self, input_ids: Tensor, *args: Any, kv_end: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """Prepare one forward of `generate`.

        Args:
            input_ids: The tokens so far, int64[B, tokens].
            args: As transformers passes them.
            kv_end: The end of the interval of each token of the prompt, int[B, L], over the padded row.
            kwargs: As transformers passes them.

        Returns:
            The keywords of `forward`.

        Raises:
            UsageError: if the mask cannot be followed with what `generate` was given.
        """
        model = cast(PreTrainedModel, self._model())
        _check_supported(model, kwargs.get("past_key_values"))
        inputs: dict[str, Any] = getattr(type(model), _METHOD)(model, input_ids, *args, **kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        batch, rows = tokens.shape[:2]
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if kv_end is None and rows > 1:  # a single token sees all before it, under every mask
            _check_causal(model, rows)
        padding = _padding(inputs.pop("attention_mask", None), batch, past + rows, tokens.device)
        row = torch.arange(past, past + rows, device=tokens.device, dtype=torch.int32).expand(batch, rows)
        ends = _row_ends(row, past, kv_end)
        is_padding = row < padding[:, None]
        inputs["kv_end"] = torch.where(is_padding, row + 1, ends)
        inputs["doc_start"] = torch.where(is_padding, row, padding[:, None])  # padding sees only itself
        return inputs


def prepare_generation(model: PreTrainedModel) -> None:
    """Give an attached model its `PrepareInputs`."""
    if hasattr(model, _METHOD):
        vars(model)[_METHOD] = PrepareInputs(model)


def restore_generation(model: PreTrainedModel) -> None:
    """Undo `prepare_generation`."""
    if isinstance(vars(model).get(_METHOD), PrepareInputs):
        del vars(model)[_METHOD]


#: What works with every model and mask.
_INSTEAD = (
    "For one conversation use Session(model, tokenizer).reply('…'), for many answer_many(model, tokenizer, "
    "[messages]): from ismdata import Session, answer_many"
)


def _check_supported(model: PreTrainedModel, cache: Any) -> None:
    """Raise UsageError for a model or a cache with which `generate` cannot follow the mask."""
    name = f"{type(model).__name__}.generate"
    if takes_two_positions(model):
        raise UsageError(f"{name}: the model has two positions per token, which generate does not count. {_INSTEAD}")
    if getattr(cache, "is_compileable", False):
        raise UsageError(
            f"{name}: a static cache has entries for tokens to come, which the mask does not know. Leave "
            f"cache_implementation out. {_INSTEAD}"
        )


def _check_causal(model: PreTrainedModel, tokens: int) -> None:
    """Raise UsageError unless the model runs under `causal`, where a prompt needs no intervals."""
    name, mask = f"{type(model).__name__}.generate", getattr(model.config, "ismdata_mask", None)
    if mask == "causal":
        return
    if mask is None:
        raise UsageError(
            f"{name}: the model's config records no mask, so it is unknown what the tokens of the prompt see. Attach "
            "it with the mask that it was trained under, as in attach(model, mask='ism'). " + _INSTEAD
        )
    raise UsageError(
        f"{name}: under the mask {mask} the tokens of a context see each other, and input_ids do not say which of "
        f"their {tokens} tokens are a context. Pass the ends of what each token sees: "
        "model.generate(**generation_inputs(model, tokenizer, [messages]), max_new_tokens=64), with from "
        "ismdata.generate import generation_inputs. If the whole prompt is one context, pass "
        f"kv_end=torch.full_like(input_ids, input_ids.shape[1]). {_INSTEAD}"
    )


def _row_ends(row: Tensor, past: int, kv_end: Tensor | None) -> Tensor:
    """The end of each row's interval, int32[B, Q]: the caller's in the prompt, causal after it."""
    causal = row + 1
    if kv_end is None or past >= kv_end.shape[1]:
        return causal
    batch, rows = row.shape
    if kv_end.shape[0] != batch:
        raise UsageError(f"kv_end is {list(kv_end.shape)}; expected one row for each of {batch} prompts")
    given = kv_end[:, past : past + rows].to(causal)
    if given.shape[1] < rows:
        given = torch.cat([given, causal[:, given.shape[1] :]], dim=1)
    if bool((given < causal).any()):
        raise UsageError("kv_end ends before its own token; expected t + 1 or more for the token t of the padded row")
    if bool((given > past + rows).any()):
        raise UsageError(
            f"kv_end goes up to {int(given.max())}, and this call ends at token {past + rows}: a context block must go "
            "through the model as a whole. Leave prefill_chunk_size out, and let kv_end end with the prompt"
        )
    return given


def _padding(attention_mask: Tensor | None, batch: int, keys: int, device: torch.device) -> Tensor:
    """The tokens of padding on the left of each row, int32[B]."""
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int32, device=device)
    if attention_mask.shape != (batch, keys):
        raise UsageError(
            f"the attention_mask is {list(attention_mask.shape)}; expected {[batch, keys]}, one value for each "
            "token in the cache and of the call"
        )
    real = attention_mask.to(device) != 0
    padding = keys - real.sum(-1, dtype=torch.int32)
    if bool((real != (torch.arange(keys, device=device) >= padding[:, None])).any()) or not bool(real[:, -1].all()):
        raise UsageError(
            "the attention_mask hides tokens after the first one that it shows; expected padding on the left only: "
            "tokenizer.padding_side = 'left'. If no mask was passed, transformers made it from the padding tokens "
            f"among the input_ids: pass attention_mask=torch.ones_like(input_ids). {_INSTEAD}"
        )
    return padding
