"""The mask inside any Hugging Face decoder: `attach` a model once, then call it with the Collator's batches.

How it works: transformers lets anyone register an attention function, and hands unknown keywords of `forward` down to
it. A hook on the model turns `doc_start` and `kv_end` into the backend's mask once a micro-batch, and passes it down as
the keyword `interval_mask`; the attention function of every layer uses it in place of the mask that the model would
make. No mask function is registered, so the model makes none. Before `attach` returns, a canary (`canary.py`) proves on
the model itself that it works there.

Shape legend: B samples, Q rows of the current call, K = keys in the cache + Q, H heads, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ismdata import glm, masks
from ismdata.canary import check_attached, loss_is_weighed, stock_logits
from ismdata.collate import IGNORE_INDEX
from ismdata.errors import DataError, UnsupportedModelError, UsageError

Model = TypeVar("Model", bound=PreTrainedModel)

#: Keyword that carries the backend's mask from the hook to every layer's attention function.
KEYWORD = "interval_mask"

#: Attribute under which a model keeps its Attachment.
_ATTACHMENT = "ismdata_attachment"

#: What a layer may ask of its attention function that changes the result and that intervals cannot express.
_REFUSED_FEATURES = {
    "sliding_window": "a sliding attention window, which would cut context blocks",
    "softcap": "soft-capped attention scores, which this backend cannot compute",
    "s_aux": "attention sinks, which this backend cannot compute",
    "position_bias": "an attention bias by position, which this backend cannot compute",
}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention over intervals."""

    #: The name in transformers' AttentionInterface. It must not contain "flash", "sdpa" or "flex_attention": dispatch
    #: inside transformers looks for these as substrings and would treat the function as its own.
    name: str
    #: (doc_start int32[B, Q], kv_end int32[B, Q], block_table int16[B, Q / 128, 4] or None, keys) -> the mask
    build_mask: Callable[[Tensor, Tensor, Tensor | None, int], Any]
    #: An attention function as transformers calls it, which finds that mask under KEYWORD.
    attention: Callable[..., tuple[Tensor, Tensor | None]]


def dense_mask(doc_start: Tensor, kv_end: Tensor, block_table: Tensor | None, keys: int) -> Tensor:
    """bool[B, 1, Q, K], True where a row sees a key. The block table is not needed."""
    key = torch.arange(keys, device=doc_start.device)
    return ((key >= doc_start[..., None]) & (key < kv_end[..., None]))[:, None]


def dense_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, H of keys, K, D]
    value: Tensor,
    attention_mask: Tensor | None,  # always None: no mask function is registered for this backend
    *,
    interval_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **features: Any,
) -> tuple[Tensor, None]:
    """torch's scaled dot product attention under the interval mask. Raises UnsupportedModelError, with the reason."""
    for feature, reason in _REFUSED_FEATURES.items():
        if features.get(feature) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} asks for {feature}: {reason}. Use another model")
    if interval_mask is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} got no {KEYWORD}: the model was entered below the one that was attached, or it "
            "does not hand its keywords down. Call the attached model itself"
        )
    if interval_mask.shape[-2:] != (query.shape[-2], key.shape[-2]):
        raise UnsupportedModelError(
            f"{type(module).__name__} has {query.shape[-2]} rows and {key.shape[-2]} keys; the mask is for "
            f"{interval_mask.shape[-2]} and {interval_mask.shape[-1]}. Static caches, and context or sequence "
            "parallelism, which cut the sequence, do not work with intervals: turn them off"
        )
    output, _ = sdpa_attention_forward(
        module, query, key, value, interval_mask, dropout=dropout, scaling=scaling, is_causal=False
    )
    return output, None


#: Every backend by the name a user gives. `auto` is the first: it works on every device.
BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(name="ismdata_dense", build_mask=dense_mask, attention=dense_attention),
}


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What `attach` changed on a model, and how to take it back; it travels with copies of the model."""

    backend: str
    hook: RemovableHandle
    stock_attention: str
    stock_loss: Callable[..., Tensor]
    #: Whether the model's forward hands `loss_weight` to its loss function (found by the canary).
    weighs_loss: bool


def attach(model: Model, backend: str = "auto", mask: str | None = None) -> Model:
    """Give a Hugging Face decoder the attention of packed sequences, in place, and return it.

    From then on `model(**batch)` takes the Collator's tensors; position_ids that are missing follow from `doc_start`
    (a model of two positions needs both); with a cache the intervals count over cached and current keys; a single token
    without intervals (decoding) sees everything; several tokens without intervals are refused. `loss_weight` multiplies
    each target's loss before the mean over targets. `mask` is recorded in the model's config as `ismdata_mask`, and so
    in the folder it is saved to. Attaching again replaces the former backend. Wrap the model (PEFT, FSDP, DDP) after
    this, not before.

    Raises UsageError for an unknown backend or mask and UnsupportedModelError, with the reason, for a model inside
    which the mask cannot work; the model is then as it was.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    if mask is not None and mask not in masks.MASKS:
        raise UsageError(f"mask is {mask!r}; expected one of {', '.join(masks.MASKS)}")
    _check_architecture(model)
    detach(model)
    chosen = next(iter(BACKENDS)) if backend == "auto" else backend
    expected = stock_logits(model)
    stock_attention = model.config._attn_implementation
    stock_loss = model.loss_function
    AttentionInterface.register(BACKENDS[chosen].name, BACKENDS[chosen].attention)
    model.set_attn_implementation(BACKENDS[chosen].name)
    model.loss_function = partial(weighted_loss, stock_loss)
    vars(model)[_ATTACHMENT] = Attachment(
        backend=chosen,
        hook=model.register_forward_pre_hook(partial(_before_forward, BACKENDS[chosen]), with_kwargs=True),
        stock_attention=stock_attention,
        stock_loss=stock_loss,
        weighs_loss=True,
    )
    try:
        check_attached(model, expected)
        vars(model)[_ATTACHMENT] = replace(vars(model)[_ATTACHMENT], weighs_loss=loss_is_weighed(model))
    except BaseException:
        detach(model)
        raise
    if mask is not None:
        model.config.ismdata_mask = mask
    return model


def detach(model: PreTrainedModel) -> None:
    """Give a model its own attention and loss back. One that was never attached stays as it is."""
    attachment: Attachment | None = vars(model).pop(_ATTACHMENT, None)
    if attachment is None:
        return
    attachment.hook.remove()
    model.set_attn_implementation(attachment.stock_attention)
    model.loss_function = attachment.stock_loss


def load(folder: str | Path, *, backend: str = "auto", mask: str | None = None, **options: Any) -> PreTrainedModel:
    """A model that `ismdata train` saved, with its mask attached. `options` go to `from_pretrained` (dtype, …).

    `mask` overrides the recorded one. Raises DataError when the folder holds no loadable model, and UsageError when no
    mask is recorded and none is given.
    """
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; expected a folder that `ismdata train` wrote")
    refuse_pickles(Path(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **options)
    except Exception as error:  # broken files make the libraries raise anything, from KeyError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not a loadable model ({first}). Train it again, or name another folder") from error
    mask = mask or getattr(model.config, "ismdata_mask", None)
    if mask is None:
        raise UsageError(
            f"{folder}: config.json records no ismdata_mask, so it is unknown under which mask the model was trained. "
            "Name one: --mask causal for a model that was not trained with ismdata"
        )
    return attach(model, backend, mask)


def refuse_pickles(folder: Path) -> None:
    """Raise DataError where a folder has weights as pickles only, which could run any code when they are loaded."""
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(kind))
    if pickles and not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{folder}: the weights are a pickle ({pickles[0]}), which may run any code and is not loaded; expected "
            "model.safetensors. If you trust it, load it with transformers; its save_pretrained writes safetensors"
        )


def weighted_loss(
    stock_loss: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    loss_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The model's own loss or, where the batch has weights, the sum of weight x loss over the number of targets.

    The divisor is `num_items_in_batch` where the Trainer gives it, else the targets of this batch; weights do not enter
    it, so a target of weight 2 pulls twice as hard as it would alone.
    """
    if loss_weight is None:
        return stock_loss(
            logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **options
        )
    if options.get("shift_labels") is not None:
        raise UnsupportedModelError(
            "loss_weight and shift_labels came together; weights are aligned with unshifted labels. "
            "Turn sequence parallelism off"
        )
    target = labels[..., 1:].to(logits.device)
    loss = nn.functional.cross_entropy(
        logits[..., :-1, :].float().flatten(0, -2), target.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    total = (loss * loss_weight[..., 1:].to(loss).flatten()).sum()
    count = (target != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _check_architecture(model: PreTrainedModel) -> None:
    """Refuse, with the reason, what is known not to work before anything runs."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{name} is no transformers PreTrainedModel. Attach the model first and wrap it afterwards"
        )
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; expected a decoder that reads context and answers")
    other = sorted({kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"})
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(other)}; expected full attention in every layer, "
            "since other layers mix documents or cut context blocks. Use another model"
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
        raise UnsupportedModelError(f"{name} has no weights yet (device meta). Load them, then attach")


def _before_forward(
    backend: Backend, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: intervals in, the backend's mask out, once a micro-batch."""
    kwargs = dict(kwargs)
    doc_start = kwargs.pop("doc_start", None)
    kv_end = kwargs.pop("kv_end", None)
    block_table = kwargs.pop("block_table", None)
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

    if doc_start is None or kv_end is None:
        if rows != 1 or (doc_start is not None) or (kv_end is not None):
            raise UsageError(
                f"the attached model got {rows} tokens a row without doc_start and kv_end, so it cannot know which "
                "keys they see: documents would see each other. Pass the Collator's batch, or intervals for a prefill"
            )
        doc_start = torch.zeros(batch, 1, dtype=torch.int32, device=tokens.device)
        kv_end = torch.full_like(doc_start, past + 1)
    elif doc_start.shape != (batch, rows) or kv_end.shape != (batch, rows):
        raise UsageError(
            f"doc_start is {list(doc_start.shape)} and kv_end {list(kv_end.shape)}; expected {[batch, rows]} as for "
            "the tokens. Context and sequence parallelism, which cut the tokens alone, do not work with intervals"
        )
    elif cache is None:
        kwargs.setdefault("use_cache", False)  # training fills no cache: it would only cost memory
    glm.check_positions(
        module,
        position_ids=kwargs.get("position_ids") is not None,
        position_ids_2=kwargs.get("position_ids_2") is not None,
    )
    if kwargs.get("position_ids") is None:
        row = torch.arange(past, past + rows, device=doc_start.device)
        kwargs["position_ids"] = (row - doc_start).long()
    kwargs[KEYWORD] = backend.build_mask(doc_start, kv_end, block_table, past + rows)
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
