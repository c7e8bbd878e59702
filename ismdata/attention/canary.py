"""The canary: checks on the model itself that the mask holds inside it, under the chosen backend.

`attach` runs a few small forward passes without gradients. A document packed twice under causal intervals must give
the logits of the stock model both times: positions restart, documents do not see each other, and nothing of the model's
attention (sinks, capped scores, biases, windows) is lost. And changing a token must change the logits of the
tokens that see it, and of no others, for every pair of tokens of a tiny packed sequence. At the start of training,
`check_training` compares the backend's outputs and gradients with those of attention in plain matrix products. Model
and random state stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ismdata import masks
from ismdata.attention.backends.base import Backend, Intervals, PerWindow
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.backends.sdpa import dense_mask, plain_attention
from ismdata.attention.layers import (
    ATTACHMENT,
    AttachedLayer,
    Attention,
    check_calls,
    check_windows,
    implementations,
    recorded,
    recorded_windows,
    restore_implementations,
)
from ismdata.attention.models import glm
from ismdata.attention.supported_models import check_parallelism
from ismdata.errors import UnsupportedModelError, UsageError
from ismdata.masks import ANSWER, PROMPT, QUERY

IntArray = NDArray[np.int32]

#: Two documents and padding: prompt, query, answer, query, answer | query, answer.
_TOKENS = 16
_SEQ_LENS = [8, 6]
_SPANS = [
    (0, 1, PROMPT, 0),
    (1, 3, QUERY, 0),
    (3, 5, ANSWER, 1),
    (5, 7, QUERY, 0),
    (7, 8, ANSWER, 1),
    (8, 11, QUERY, 0),
    (11, 14, ANSWER, 1),
]
_HALVES = [_TOKENS // 2] * 2
_HALF_SPANS = [(0, _TOKENS // 2, ANSWER, 1), (_TOKENS // 2, _TOKENS, ANSWER, 1)]

#: `check_training` uses a sequence of this many times the spans above, or more for a backend that requires blocks.
_TRAINING_SCALE = 2

#: What `check_training` compares in each layer, in this order.
_COMPARED = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")

#: The tolerance of a row relative to its norm: in eps of the backend's dtype, and at least (float32 products may run in
#: TF32). One key too many among 100 differs by more.
_EPS, _LEAST = 8, 4e-3


class StockLogits(NamedTuple):
    """The stock model's logits for half of the canary's tokens, float32[T / 2, V] each."""

    own: Tensor
    #: With positions 0, 1, 2 … passed to it.
    from_zero: Tensor
    #: The windows of its masks.
    windows: set[int]


def stock_logits(model: PreTrainedModel, backend: Backend) -> StockLogits:
    """Run the stock model on half of the canary's tokens, under eager attention.

    Eager attention is the one that computes all that a model's configuration asks for: transformers up to 5.20 runs
    Gemma 2 under sdpa, without its soft caps.

    Args:
        model: Before it is attached.
        backend: The backend to come, whose dtype the logits are computed in.

    Returns:
        The logits.
    """
    tokens = _tokens(model)[None, : _TOKENS // 2]
    positions = {} if glm.takes_two_positions(model) else {"position_ids": torch.arange(_TOKENS // 2)[None]}
    saved = implementations(model)
    model.set_attn_implementation("eager")
    try:
        with _quiet(model), _computing(model, backend), recorded_windows() as windows:
            own, from_zero = (
                _logits(model(input_ids=tokens, use_cache=False, **each))[0]
                for each in ({}, {name: ids.to(tokens.device) for name, ids in positions.items()})
            )
    finally:
        restore_implementations(saved)
    return StockLogits(own, from_zero, windows)


def check_attached(model: PreTrainedModel, backend: Backend, stock: StockLogits) -> list[AttachedLayer]:
    """Check that an attached model follows the intervals and still gives its `stock_logits`.

    Args:
        model: The attached model.
        backend: Its backend.
        stock: What `stock_logits` returned.

    Returns:
        The model's layers.

    Raises:
        UnsupportedModelError: if it does not.
    """
    name = type(model).__name__
    tokens = _tokens(model)
    allowed = max(8 * torch.finfo(_dtype(model, backend)).eps, 1e-3)
    scale = float(stock.own.abs().max())
    if not float((stock.from_zero - stock.own).abs().max()) <= allowed * scale:
        raise UnsupportedModelError(
            f"{name} gives other logits with position_ids 0, 1, 2 … than without position_ids: it counts positions in "
            "another way, which packed documents do not have. Use another model"
        )

    twice = tokens[: _TOKENS // 2].repeat(1, 2)
    intervals = masks.intervals(_HALVES, _HALF_SPANS, seq_len=_TOKENS, mask="causal")
    with _quiet(model), recorded(backend) as calls:
        causal = _forward(model, backend, twice, *intervals)[0]
    layers = check_calls(model, calls)
    check_windows(model, calls, stock.windows)
    difference = float((causal - stock.own.repeat(2, 1)).abs().max())
    if not difference <= allowed * scale:
        raise UnsupportedModelError(
            f"{name} gives other logits when attached (largest difference {difference:.3g}, logits up to {scale:.3g}), "
            "even under the causal mask: its attention or its positions do something that intervals cannot express. "
            "Use another model"
        )

    doc_start, kv_end = masks.intervals(_SEQ_LENS, _SPANS, seq_len=_TOKENS, mask="ism")
    sees = torch.from_numpy(masks.dense(doc_start, kv_end))  # bool[T, T]
    with _quiet(model):
        base, *changed = _forward(model, backend, _perturbed(tokens), doc_start, kv_end)
    change = torch.stack([(row - base).abs().amax(-1) for row in changed], dim=1).cpu()  # [T rows, T perturbed tokens]
    eps = torch.finfo(_dtype(model, backend)).eps
    threshold = max(2 * eps, 1e-5) * float(base.abs().max())
    leak = (change > threshold) & ~sees
    if leak.any() or not change.isfinite().all():
        row, token = (int(index) for index in (leak | ~change.isfinite()).nonzero()[0])
        raise UnsupportedModelError(
            f"{name} does not follow the mask: changing token {token} changes row {row}, which must not see it. "
            "Its layers mix tokens outside of masked attention. Use another model"
        )
    # A trained model may all but ignore a single token, so half of the pairs suffice.
    ahead = sees & torch.ones_like(sees).triu(1)
    for pairs, what in ((sees, "what it may see"), (ahead, "the context block ahead of it")):
        if (change > threshold)[pairs].float().mean() < 0.5:
            raise UnsupportedModelError(
                f"{name} does not look at {what}: changing tokens there changes too few of the rows that see them. "
                "It has a causal or local restriction of its own, or weights without effect. Use another model"
            )
    return layers


def loss_is_weighted(model: PreTrainedModel, backend: Backend) -> bool:
    """Whether an attached model's loss uses `loss_weight`: with weights of zero the loss must be zero."""
    tokens = _padded(_tokens(model)[None], _rows(backend))
    span = [(0, _TOKENS, ANSWER, 1)]
    intervals = masks.intervals([_TOKENS], span, seq_len=tokens.shape[1], mask="causal")
    with _quiet(model), _computing(model, backend):
        weights = torch.zeros(tokens.shape, device=tokens.device)
        output = _call(model, *intervals, input_ids=tokens, labels=tokens, loss_weight=weights)
    return float(output.loss) == 0.0


def check_training(
    model: nn.Module, *, device: torch.device | str | None = None, autocast: torch.dtype | None = None
) -> None:
    """Check an attached model before it is trained, on one short packed batch.

    In every layer the backend's output and gradients must agree with attention in plain matrix products, as far as the
    dtype allows. Changing a token must leave rows that do not see it unchanged. Each layer must call the backend
    exactly once.

    Args:
        model: The attached model, possibly wrapped since (PEFT).
        device: Where it will train. A model that is elsewhere is moved there and back.
        autocast: The dtype that it will train in, if not its own.

    Raises:
        UsageError: if the model is not attached, or its backend cannot train on the device.
        UnsupportedModelError: for any difference.

    Example:
        check_training(model, device="cuda", autocast=torch.bfloat16)
    """
    inner = _attached_part(model)
    home = inner.device
    device = home if device is None else torch.device(device)
    name = vars(inner)[ATTACHMENT].backend
    backend = BACKENDS[name]
    check_parallelism()
    reason = backend.missing(device) or backend.missing_for_training(device)
    if reason is not None:
        raise UsageError(f"the backend {name} cannot train on {device}: {reason}. Use the backend auto")
    nn.Module.to(inner, device)
    try:
        _check_short_batch(inner, name, backend, autocast or _dtype(inner, backend))
    finally:
        nn.Module.to(inner, home)


def _check_short_batch(model: PreTrainedModel, backend_name: str, backend: Backend, dtype: torch.dtype) -> None:
    """Run a batch of two rows, the second with another token at the start of the last answer."""
    name = type(model).__name__
    factor = _TRAINING_SCALE if backend.rows_multiple == 1 else 2 * backend.rows_multiple // _TOKENS
    doc_start, kv_end = masks.intervals(
        [length * factor for length in _SEQ_LENS],
        [(start * factor, end * factor, kind, train) for start, end, kind, train in _SPANS],
        seq_len=_TOKENS * factor,
        mask="ism",
    )
    place = _SPANS[-1][0] * factor
    tokens = _tokens(model).repeat(factor)
    changed = tokens.clone()
    changed[place] = tokens[place - 1]
    compared = _compared(backend_name, backend, _reference(model.device, doc_start, kv_end))
    with _quiet(model), recorded(backend, compared) as calls, _autocast(model, dtype):
        logits = _logits(_call(model, doc_start, kv_end, input_ids=torch.stack([tokens, changed])))
    check_calls(model, calls, vars(model)[ATTACHMENT].layers)
    change = (logits[1] - logits[0]).abs().amax(-1).cpu()  # [T]
    threshold = max(2 * torch.finfo(dtype).eps, 1e-5) * float(logits.abs().max())
    sees = torch.from_numpy(masks.dense(doc_start, kv_end))[:, place]
    if not bool((change[~sees] <= threshold).all()) or not bool((change[sees] > threshold).any()):
        raise UnsupportedModelError(
            f"{name} does not follow the mask under the backend {backend_name}: changing a token changes rows that "
            "must not see it, or none that see it. Use another backend or another model"
        )


def _compared(backend_name: str, backend: Backend, reference: Attention) -> Attention:
    """The backend's attention function, which also raises where its output or gradients differ from the reference's.

    It compares on random queries, keys and values, not on the model's own. The attention of a trained model can be so
    concentrated that the gradients of correct kernels in bfloat16 differ by several percent.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        own = (query, key, value)
        generator = torch.Generator(query.device).manual_seed(0)
        noise = [
            torch.randn(each.shape, device=each.device, generator=generator).to(each).requires_grad_() for each in own
        ]
        functions: tuple[Attention, ...] = (backend.attention, reference)
        sides = []
        with torch.enable_grad():
            for function in functions:
                output, _ = function(module, *noise, attention_mask, **options)
                wave = torch.sin(torch.arange(output.numel(), device=output.device)).view_as(output)
                sides.append(
                    (output.detach(), *torch.autograd.grad(output, noise, wave.to(output), materialize_grads=True))
                )
        allowed = max(_EPS * torch.finfo(sides[0][0].dtype).eps, _LEAST)
        for what, here, there in zip(_COMPARED, *sides, strict=True):
            error = _row_error(here, there)
            if not error <= allowed:
                layer = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
                raise UnsupportedModelError(
                    f"{layer}: under the backend {backend_name} its {what} differs from the reference by "
                    f"{error:.2g} of its norm; expected at most {allowed:.2g}. It would train under another mask or on "
                    "wrong gradients. Use another backend, and please report this"
                )
        return backend.attention(module, query, key, value, attention_mask, **options)

    return attention


def _row_error(here: Tensor, there: Tensor) -> float:
    """The largest difference of two rows, relative to the norm of `there`'s row or, if larger, to its mean norm."""
    here, there = here.float(), there.float()
    size = there.norm(dim=-1)
    return float(((here - there).norm(dim=-1) / size.clamp(min=float(size.mean()))).max())


def _attached_part(model: nn.Module) -> PreTrainedModel:
    """The attached model inside its wrappers."""
    for module in model.modules():
        if ATTACHMENT in vars(module):
            return cast(PreTrainedModel, module)
    raise UsageError(f"{type(model).__name__} has no attached model inside. Call ismdata.attach before training")


def _reference(device: torch.device, doc_start: IntArray, kv_end: IntArray) -> Attention:
    """Attention in plain matrix products, from the canary's own intervals and not from what the backend prepared."""
    starts, ends = (_on(device, array)[None] for array in (doc_start, kv_end))
    sees = PerWindow(Intervals(doc_start=starts, kv_end=ends, keys=len(kv_end)), dense_mask)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast(device.type, enabled=False):
            output = plain_attention(query, key, value, sees.for_window(sliding_window), scale=scale, softcap=softcap)
        return output.transpose(1, 2).contiguous(), None

    return attention


def _rows(backend: Backend) -> int:
    """The canary's T: its tokens, padded to the multiple that the backend requires."""
    return -(-_TOKENS // backend.rows_multiple) * backend.rows_multiple


def _tokens(model: PreTrainedModel) -> Tensor:
    """int64[_TOKENS]: tokens spread over the vocabulary, distinct if it is large enough."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    return (torch.arange(1, _TOKENS + 1, device=model.device) * max(1, vocabulary // (_TOKENS + 2))) % vocabulary


def _padded(tokens: Tensor, rows: int) -> Tensor:
    """int64[B, _TOKENS] -> int64[B, rows], padded with token 0."""
    return nn.functional.pad(tokens, (0, rows - tokens.shape[1]))


def _perturbed(tokens: Tensor) -> Tensor:
    """int64[1 + T, T]: the tokens, then for each place a copy that differs there."""
    copies = tokens.repeat(_TOKENS + 1, 1)
    place = torch.arange(_TOKENS, device=tokens.device)
    copies[place + 1, place] = tokens.roll(_TOKENS // 2)
    return copies


def _forward(model: PreTrainedModel, backend: Backend, tokens: Tensor, doc_start: IntArray, kv_end: IntArray) -> Tensor:
    """The logits, float32[B, _TOKENS, V]. A backend that requires longer rows gets one at a time, hence one shape."""
    rows = _rows(backend)
    padding = np.arange(_TOKENS, rows, dtype=np.int32)
    doc_start, kv_end = np.concatenate([doc_start, padding]), np.concatenate([kv_end, padding + 1])
    parts = torch.split(tokens, 1 if rows > _TOKENS else len(tokens))
    with _computing(model, backend):
        logits = [
            _logits(_call(model, doc_start, kv_end, input_ids=_padded(part, rows)))[:, :_TOKENS] for part in parts
        ]
    return torch.cat(logits)


def _call(model: PreTrainedModel, doc_start: IntArray, kv_end: IntArray, **tensors: Tensor) -> Any:
    given = next(iter(tensors.values()))
    ends = {
        name: _on(given.device, array).expand(given.shape[:2])
        for name, array in (("doc_start", doc_start), ("kv_end", kv_end))
    }
    if glm.takes_two_positions(model):  # positions of context, the stock model's default
        first = torch.arange(1, given.shape[1] + 1, device=given.device) - ends["doc_start"]
        ends |= {"position_ids": first, "position_ids_2": torch.zeros_like(first)}
    return model(use_cache=False, **ends, **tensors)


def _on(device: torch.device, ends: IntArray) -> Tensor:
    return torch.from_numpy(ends).to(device)


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            "the model returns no logits; expected a causal language model, as AutoModelForCausalLM loads"
        )
    return logits.float()


def _dtype(model: PreTrainedModel, backend: Backend) -> torch.dtype:
    """The dtype that the model computes in: a half-precision backend runs a wider model under autocast."""
    dtype: torch.dtype = model.dtype
    widest = model.device.type != "cpu" and backend.half_only and dtype not in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if widest else dtype


def _computing(model: PreTrainedModel, backend: Backend) -> AbstractContextManager[object]:
    return _autocast(model, _dtype(model, backend))


def _autocast(model: PreTrainedModel, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == model.dtype else torch.autocast(model.device.type, dtype)


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients. Modes and random state are restored."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.train(False)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
