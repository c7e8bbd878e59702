"""The mask inside any Hugging Face decoder: `attach` a model once, then call it with the Collator's batches.

transformers has a registry of attention functions, and passes unknown keywords of `forward` down to them. A hook on the
model turns `doc_start` and `kv_end` into the backend's mask once per micro-batch and passes it on as the keyword
`interval_mask`; each layer's attention function uses it instead of the model's own mask. No mask function is
registered, so the model makes none. Before `attach` returns, a canary (`canary.py`) checks on the model itself that all
this works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from ismdata.attention.around import check_adapters, check_counts_cache, check_shape
from ismdata.attention.backends.base import KEYWORD, Backend, Intervals
from ismdata.attention.backends.registry import BACKENDS, choose
from ismdata.attention.canary import check_attached, loss_is_weighted, stock_logits
from ismdata.attention.generation import prepare_generation, restore_generation
from ismdata.attention.layers import (
    ATTACHMENT,
    AttachedLayer,
    Implementation,
    check_implementation,
    implementations,
    restore_implementations,
    set_implementation,
)
from ismdata.attention.models import glm
from ismdata.attention.rotary import check_rotary
from ismdata.attention.supported_models import check_architecture, check_parallelism
from ismdata.attention.weighted_loss import weighted_loss
from ismdata.choices import check_mask
from ismdata.display import LOGGED, Reporter
from ismdata.errors import UnsupportedModelError, UsageError

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What `attach` changed on a model, for `detach` to undo. Copies of the model have it too."""

    backend: str
    hook: RemovableHandle
    stock_attention: list[Implementation]
    stock_loss: Callable[..., Tensor]
    #: The attention modules (the canary finds them).
    layers: tuple[AttachedLayer, ...] = ()
    #: Whether the model's forward passes `loss_weight` to its loss function (the canary finds out).
    weights_loss: bool


def attach(
    model: Model,
    backend: str = "auto",
    mask: str | None = None,
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    reporter: Reporter = LOGGED,
) -> Model:
    """Give a Hugging Face decoder the attention of packed sequences, in place.

    Afterwards `model(**batch)` takes the Collator's tensors. Missing position_ids follow from `doc_start` (a model with
    two positions requires both). With a cache, intervals count over cached and current keys. A single token without
    intervals (decoding) sees everything; several tokens without intervals are refused, except in `model.generate`
    (`generation.py`). A layer's sliding window narrows the intervals. `loss_weight` multiplies each target's loss
    before the mean over targets.

    Attaching again replaces the former backend. Wrap the model (PEFT, FSDP, DDP) after this, not before.

    Args:
        model: A decoder that takes its attention from transformers' AttentionInterface.
        backend: `auto`, `sdpa`, `flex` or `varlen`.
        mask: The mask that the model is trained under, recorded in its config as `ismdata_mask`, so that a saved model
            has it too.
        device: Where the model will run, if it is not there yet; `auto` depends on it.
        autocast: The dtype that it will run in, if not its own; `auto` depends on it.
        reporter: Receives a line that names the backend `auto` chose.

    Returns:
        The same model.

    Raises:
        UsageError: for an unknown mask or backend, and for a backend that cannot run on the device.
        UnsupportedModelError: if the mask cannot work inside the model. The model is unchanged then.

    Example:
        model = attach(AutoModelForCausalLM.from_pretrained("model"), mask="ism")
        loss = model(**Collator()([dataset[0], dataset[1]])).loss
    """
    if mask is not None:
        check_mask(mask)
    check_architecture(model)
    check_parallelism()
    name = choose(
        backend,
        torch.device(model.device if device is None else device),
        dtype=autocast or model.dtype,
        soft_caps=getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None,
        reporter=reporter,
    )
    chosen = BACKENDS[name]
    detach(model)
    expected = stock_logits(model, chosen)
    stock_attention = implementations(model)
    stock_loss = model.loss_function
    AttentionInterface.register(chosen.name, chosen.attention)
    set_implementation(model, chosen.name)
    model.loss_function = partial(weighted_loss, stock_loss)
    vars(model)[ATTACHMENT] = Attachment(
        backend=name,
        hook=model.register_forward_pre_hook(partial(_before_forward, chosen), with_kwargs=True),
        stock_attention=stock_attention,
        stock_loss=stock_loss,
        weights_loss=True,
    )
    try:
        layers = tuple(check_attached(model, chosen, expected))
        vars(model)[ATTACHMENT] = replace(
            vars(model)[ATTACHMENT], layers=layers, weights_loss=loss_is_weighted(model, chosen)
        )
    except BaseException:
        detach(model)
        raise
    prepare_generation(model)
    if mask is not None:
        model.config.ismdata_mask = mask
    return model


def attached_backend(model: PreTrainedModel) -> str:
    """Return the name of an attached model's backend.

    Args:
        model: A model that `attach` changed.

    Returns:
        `sdpa`, `flex` or `varlen`.

    Raises:
        UsageError: if the model is not attached.
    """
    attachment: Attachment | None = vars(model).get(ATTACHMENT)
    if attachment is None:
        raise UsageError(f"{type(model).__name__} is not attached. Call ismdata.attach first")
    return attachment.backend


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: give a model its own attention and loss back.

    Args:
        model: Any model; one that is not attached stays unchanged.
    """
    attachment: Attachment | None = vars(model).pop(ATTACHMENT, None)
    if attachment is None:
        return
    attachment.hook.remove()
    restore_generation(model)
    restore_implementations(attachment.stock_attention)
    model.loss_function = attachment.stock_loss


def _before_forward(
    backend: Backend, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: replace the intervals by the backend's mask, once per micro-batch."""
    attachment: Attachment = vars(module)[ATTACHMENT]
    check_implementation(module, attachment.layers, attachment.backend, backend.name)
    kwargs = dict(kwargs)
    doc_start = kwargs.pop("doc_start", None)
    kv_end = kwargs.pop("kv_end", None)
    block_table = kwargs.pop("block_table", None)
    tables = {name: kwargs.pop(name) for each in BACKENDS.values() for name in each.tables if name in kwargs}
    tokens = _tokens(args, kwargs)
    batch, rows = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    check_adapters(module)
    _check_attention_mask(kwargs.pop("attention_mask", None))
    if kwargs.get("loss_weight") is not None and not attachment.weights_loss:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass the keywords of forward to its loss function, so it would ignore "
            "loss_weight. Remove it from the batch to train without weights, or use another model"
        )

    decodes = doc_start is None and kv_end is None and rows == 1
    if decodes:
        doc_start = torch.zeros(batch, 1, dtype=torch.int32, device=tokens.device)
        kv_end = torch.full_like(doc_start, past + 1)
    elif doc_start is None or kv_end is None:
        raise UsageError(
            f"the attached model got samples of {rows} tokens without doc_start and kv_end, which say what keys a "
            "token sees: documents would see each other. Pass the Collator's batch, or intervals for a prefill"
        )
    else:
        check_shape(batch, rows, doc_start, kv_end)
        if past:
            check_counts_cache(doc_start, kv_end, past)
    if not decodes and cache is None:
        kwargs.setdefault("use_cache", False)  # a cache would only cost memory in training
    intervals = Intervals(
        doc_start=doc_start,
        kv_end=kv_end,
        block_table=block_table,
        keys=past + rows,
        logits_to_keep=kept if isinstance(kept := kwargs.get("logits_to_keep"), int) else 0,
        fills_cache=decodes or cache is not None or bool(kwargs.get("use_cache")),
        tables={name: tables[name] for name in backend.tables if name in tables},
    )
    if intervals.one_pass:
        check_rotary(module.config, doc_start, kv_end)
    if intervals.one_pass and rows % backend.rows_multiple:
        raise UsageError(
            f"the batch has samples of {rows} tokens; the backend {attachment.backend} needs a multiple of "
            f"{backend.rows_multiple}. Pad the samples, or use the backend sdpa"
        )
    glm.check_positions(
        module,
        position_ids=kwargs.get("position_ids") is not None,
        position_ids_2=kwargs.get("position_ids_2") is not None,
    )
    if kwargs.get("position_ids") is None:
        row = torch.arange(past, past + rows, device=doc_start.device)
        kwargs["position_ids"] = (row - doc_start).long()
    kwargs[KEYWORD] = backend.prepare(intervals)
    return (), kwargs


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens or embeddings of a call. A positional `input_ids` becomes a keyword in `kwargs`."""
    if len(args) > 1:
        raise UsageError("the attached model got several positional arguments. Pass all but input_ids by keyword")
    if args:
        kwargs["input_ids"] = args[0]
    for candidate in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(candidate, Tensor):
            return candidate
    raise UsageError("the attached model was called without input_ids or inputs_embeds. Pass the Collator's batch")


def _check_attention_mask(attention_mask: Any) -> None:
    """Raise UsageError for an attention_mask that hides tokens, since the backend would ignore it.

    `generate` passes an all-ones mask, which hides none.
    """
    if attention_mask is None:
        return
    if not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and bool(attention_mask.all())):
        raise UsageError(
            "the attached model got an attention_mask that hides tokens; its mask comes from doc_start and kv_end. "
            "Leave attention_mask out; only model.generate takes one, for padding on the left"
        )
