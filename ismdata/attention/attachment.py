"""The mask inside any Hugging Face decoder: `attach` a model once, then call it with the Collator's batches.

How it works: transformers lets anyone register an attention function, and hands unknown keywords of `forward` down to
it. A hook on the model turns `doc_start` and `kv_end` into the backend's mask once a micro-batch, and passes it down as
the keyword `interval_mask`; the attention function of every layer uses it in place of the mask that the model would
make. No mask function is registered, so the model makes none. Before `attach` returns, a canary (`canary.py`) proves on
the model itself that it works there.
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

from ismdata.attention.backends.base import KEYWORD, Backend, Intervals
from ismdata.attention.backends.registry import BACKENDS, choose
from ismdata.attention.canary import check_attached, loss_is_weighed, stock_logits
from ismdata.attention.models import glm
from ismdata.attention.supported_models import check_architecture, check_parallelism
from ismdata.attention.weighted_loss import weighted_loss
from ismdata.choices import check_mask
from ismdata.errors import UnsupportedModelError, UsageError

Model = TypeVar("Model", bound=PreTrainedModel)

#: Attribute under which a model keeps its Attachment.
_ATTACHMENT = "ismdata_attachment"


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What `attach` changed on a model, and how to take it back; it travels with copies of the model."""

    backend: str
    hook: RemovableHandle
    stock_attention: str
    stock_loss: Callable[..., Tensor]
    #: Whether the model's forward hands `loss_weight` to its loss function (found by the canary).
    weighs_loss: bool


def attach(
    model: Model,
    backend: str = "auto",
    mask: str | None = None,
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Model:
    """Give a Hugging Face decoder the attention of packed sequences, in place, and return it.

    From then on `model(**batch)` takes the Collator's tensors; position_ids that are missing follow from `doc_start`
    (a model of two positions needs both); with a cache the intervals count over cached and current keys; a single token
    without intervals (decoding) sees everything; several tokens without intervals are refused. A layer's sliding window
    narrows the intervals. `loss_weight` multiplies each target's loss before the mean over targets.

    backend: `auto`, or a name in `backends.BACKENDS`. device: where the model will run, if it is not there yet.
    autocast: the dtype it will run in, if not its own. The two decide what `auto` is. `mask` is recorded in the model's
    config as `ismdata_mask`, and so in the folder it is saved to. Attaching again replaces the former backend. Wrap the
    model (PEFT, FSDP, DDP) after this, not before.

    Raises UsageError for an unknown mask, and for a backend that is unknown or cannot run on the device (naming what is
    missing); UnsupportedModelError, with the reason, for a model inside which the mask cannot work. The model is then
    as it was.
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
    )
    chosen = BACKENDS[name]
    detach(model)
    expected = stock_logits(model, chosen)
    stock_attention = model.config._attn_implementation
    stock_loss = model.loss_function
    AttentionInterface.register(chosen.name, chosen.attention)
    model.set_attn_implementation(chosen.name)
    model.loss_function = partial(weighted_loss, stock_loss)
    vars(model)[_ATTACHMENT] = Attachment(
        backend=name,
        hook=model.register_forward_pre_hook(partial(_before_forward, chosen), with_kwargs=True),
        stock_attention=stock_attention,
        stock_loss=stock_loss,
        weighs_loss=True,
    )
    try:
        check_attached(model, chosen, expected)
        vars(model)[_ATTACHMENT] = replace(vars(model)[_ATTACHMENT], weighs_loss=loss_is_weighed(model, chosen))
    except BaseException:
        detach(model)
        raise
    if mask is not None:
        model.config.ismdata_mask = mask
    return model


def attached_backend(model: PreTrainedModel) -> str:
    """The name of the backend that a model was attached with. Raises UsageError for one that was not."""
    attachment: Attachment | None = vars(model).get(_ATTACHMENT)
    if attachment is None:
        raise UsageError(f"{type(model).__name__} is not attached; call ismdata.attach first")
    return attachment.backend


def detach(model: PreTrainedModel) -> None:
    """Give a model its own attention and loss back. One that was never attached stays as it is."""
    attachment: Attachment | None = vars(model).pop(_ATTACHMENT, None)
    if attachment is None:
        return
    attachment.hook.remove()
    model.set_attn_implementation(attachment.stock_attention)
    model.loss_function = attachment.stock_loss


def _before_forward(
    backend: Backend, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: intervals in, the backend's mask out, once a micro-batch."""
    kwargs = dict(kwargs)
    doc_start = kwargs.pop("doc_start", None)
    kv_end = kwargs.pop("kv_end", None)
    block_table = kwargs.pop("block_table", None)
    tables = {name: kwargs.pop(name) for each in BACKENDS.values() for name in each.tables if name in kwargs}
    tokens = _tokens(args, kwargs)
    batch, rows = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    _check_attention_mask(kwargs.get("attention_mask"))
    if kwargs.get("loss_weight") is not None and not vars(module)[_ATTACHMENT].weighs_loss:
        raise UnsupportedModelError(
            f"{type(module).__name__} computes its loss without the keywords of forward, so it would ignore "
            "loss_weight. Drop it from the batch to train without weights, or use another model"
        )

    decodes = doc_start is None and kv_end is None and rows == 1
    if decodes:
        doc_start = torch.zeros(batch, 1, dtype=torch.int32, device=tokens.device)
        kv_end = torch.full_like(doc_start, past + 1)
    elif doc_start is None or kv_end is None:
        raise UsageError(
            f"the attached model got {rows} tokens a row without doc_start and kv_end, so it cannot know which "
            "keys they see: documents would see each other. Pass the Collator's batch, or intervals for a prefill"
        )
    elif doc_start.shape != (batch, rows) or kv_end.shape != (batch, rows):
        raise UsageError(
            f"doc_start is {list(doc_start.shape)} and kv_end {list(kv_end.shape)}; expected {[batch, rows]} as for "
            "the tokens. Context and sequence parallelism, which cut the tokens alone, do not work with intervals"
        )
    elif cache is None:
        kwargs.setdefault("use_cache", False)  # training fills no cache: it would only cost memory
    intervals = Intervals(
        doc_start=doc_start,
        kv_end=kv_end,
        block_table=block_table,
        keys=past + rows,
        fills_cache=decodes or cache is not None or bool(kwargs.get("use_cache")),
        tables={name: tables[name] for name in backend.tables if name in tables},
    )
    if intervals.one_pass and rows % backend.rows_multiple:
        raise UsageError(
            f"the batch has {rows} tokens a row; the backend {vars(module)[_ATTACHMENT].backend} takes multiples of "
            f"{backend.rows_multiple}. Pad the rows, or use the backend sdpa"
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
    """The tokens or embeddings of the call; positional ones become a keyword."""
    if len(args) > 1:
        raise UsageError("the attached model got several positional arguments. Pass all but input_ids by keyword")
    if args:
        kwargs["input_ids"] = args[0]
    for candidate in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(candidate, Tensor):
            return candidate
    raise UsageError("the attached model was called without input_ids or inputs_embeds. Pass the Collator's batch")


def _check_attention_mask(attention_mask: Any) -> None:
    """An all-ones padding mask (generate makes one) says nothing; anything else would be ignored, so it is refused."""
    if attention_mask is None:
        return
    if not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and bool(attention_mask.all())):
        raise UsageError(
            "the attached model got an attention_mask that hides something; its mask comes from doc_start and kv_end. "
            "Leave attention_mask out; generate for one conversation at a time, without padding"
        )
