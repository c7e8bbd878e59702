"""The canary: does the mask really hold inside this very model, under this very backend?

At `attach`, a few small forwards without gradients. A document packed twice under causal intervals must give, both
times, the logits that the model gave by itself: positions restart, documents are apart, and nothing of the model's
attention (sinks, capped scores, biases, windows) was lost on the way. And changing a token must change exactly the
rows that see it (law 4), tried on every pair of a tiny packed sequence. At the start of a training, `check_training`
compares the backend with attention written out, gradients and all. Nothing is kept, and the random state stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ismdata import masks
from ismdata.attention.backends.base import Backend, Intervals, PerWindow
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.backends.sdpa import dense_mask, plain_attention
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

#: A training's canary is a sequence of this many times the spans above (more where a backend wants blocks).
_TRAINING_SCALE = 2

#: What `check_training` compares in each layer.
_COMPARED = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")

#: How far a row may be from attention written out, relative to its size: in eps of the dtype that the backend computes
#: in, and at least, since matrix products of float32 may be in TF32. One key too many among 100 is more.
_EPS, _LEAST = 8, 4e-3

#: What transformers calls an attention function.
Attention = Callable[..., tuple[Tensor, Tensor | None]]


def stock_logits(model: PreTrainedModel, backend: Backend) -> Tensor:
    """float32[T / 2, V]: what the model, before anything is attached, makes of half the canary's tokens."""
    with _quiet(model), _computing(model, backend):
        return _logits(model(input_ids=_tokens(model)[None, : _TOKENS // 2], use_cache=False))[0]


def check_attached(model: PreTrainedModel, backend: Backend, stock: Tensor) -> None:
    """Raise UnsupportedModelError unless the attached model keeps to the intervals and to its `stock_logits`."""
    name = type(model).__name__
    tokens = _tokens(model)
    eps = torch.finfo(_dtype(model, backend)).eps

    twice = tokens[: _TOKENS // 2].repeat(1, 2)
    intervals = masks.intervals(_HALVES, _HALF_SPANS, seq_len=_TOKENS, mask="causal")
    with _quiet(model), _recorded(backend) as calls:
        causal = _forward(model, backend, twice, *intervals)[0]
    _check_calls(model, calls)
    scale = float(stock.abs().max())
    difference = float((causal - stock.repeat(2, 1)).abs().max())
    if not difference <= max(8 * eps, 1e-3) * scale:
        raise UnsupportedModelError(
            f"{name} gives other logits once attached (largest difference {difference:.3g}, logits up to {scale:.3g}), "
            "even for documents under the causal mask: its attention or its positions do something that intervals "
            "cannot carry. Use another model"
        )

    doc_start, kv_end = masks.intervals(_SEQ_LENS, _SPANS, seq_len=_TOKENS, mask="ism")
    sees = torch.from_numpy(masks.dense(doc_start, kv_end))  # bool[T, T]
    with _quiet(model):
        base, *changed = _forward(model, backend, _perturbed(tokens), doc_start, kv_end)
    change = torch.stack([(row - base).abs().amax(-1) for row in changed], dim=1).cpu()  # [T rows, T perturbed tokens]
    threshold = max(2 * eps, 1e-5) * float(base.abs().max())
    leak = (change > threshold) & ~sees
    if leak.any() or not change.isfinite().all():
        row, token = (int(index) for index in (leak | ~change.isfinite()).nonzero()[0])
        raise UnsupportedModelError(
            f"{name} does not keep to the mask: changing token {token} changes row {row}, which must not see it. "
            "Its layers mix tokens outside the attention that the mask governs. Use another model"
        )
    # A trained head may all but ignore a single token, so most pairs are asked for and not all.
    ahead = sees & torch.ones_like(sees).triu(1)
    for pairs, what in ((sees, "what it may see"), (ahead, "the context block ahead of it")):
        if (change > threshold)[pairs].float().mean() < 0.5:
            raise UnsupportedModelError(
                f"{name} does not look at {what}: changing tokens there changes too few of the rows that see them. "
                "It has a causal or local restriction of its own, or weights that pass nothing on. Use another model"
            )


def loss_is_weighted(model: PreTrainedModel, backend: Backend) -> bool:
    """Whether a batch's `loss_weight` reaches the attached model's loss: with weights of zero the loss is zero."""
    tokens = _lengthened(_tokens(model)[None], _rows(backend))
    span = [(0, _TOKENS, ANSWER, 1)]
    intervals = masks.intervals([_TOKENS], span, seq_len=tokens.shape[1], mask="causal")
    with _quiet(model), _computing(model, backend):
        weights = torch.zeros(tokens.shape, device=tokens.device)
        output = _call(model, *intervals, input_ids=tokens, labels=tokens, loss_weight=weights)
    return float(output.loss) == 0.0


def check_training(
    model: nn.Module, *, device: torch.device | str | None = None, autocast: torch.dtype | None = None
) -> None:
    """Compare the attached model's backend with attention written out, on one short packed batch, before a training.

    In every layer its output and its gradients must agree with attention written out, as far as the dtype allows;
    changing a token must leave the rows alone that do not see it; each layer must call the function exactly once.
    model: attached, possibly wrapped since (PEFT). device: where it will train; one that is elsewhere goes there and
    back. autocast: the dtype that the training computes in, where that is not the model's.

    Raises UsageError for a model that is not attached, or whose backend cannot train there; UnsupportedModelError for
    any difference.
    """
    inner = _attached_part(model)
    home = inner.device
    device = home if device is None else torch.device(device)
    key, backend = next((key, each) for key, each in BACKENDS.items() if each.name == inner.config._attn_implementation)
    check_parallelism()
    reason = backend.missing(device) or backend.missing_for_training(device)
    if reason is not None:
        raise UsageError(f"the backend {key} cannot train on {device}: {reason}")
    nn.Module.to(inner, device)
    try:
        _check_short_batch(inner, key, backend, autocast or _dtype(inner, backend))
    finally:
        nn.Module.to(inner, home)


def _check_short_batch(model: PreTrainedModel, key: str, backend: Backend, dtype: torch.dtype) -> None:
    """A batch of two rows, the second with another token at the start of the last answer."""
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
    compared = _compared(key, backend, _oracle(model.device, doc_start, kv_end))
    with _quiet(model), _recorded(backend, compared) as calls, _autocast(model, dtype):
        logits = _logits(_call(model, doc_start, kv_end, input_ids=torch.stack([tokens, changed])))
    _check_calls(model, calls)
    change = (logits[1] - logits[0]).abs().amax(-1).cpu()  # [T]
    threshold = max(2 * torch.finfo(dtype).eps, 1e-5) * float(logits.abs().max())
    sees = torch.from_numpy(masks.dense(doc_start, kv_end))[:, place]
    if not bool((change[~sees] <= threshold).all()) or not bool((change[sees] > threshold).any()):
        raise UnsupportedModelError(
            f"{name} does not keep to the mask under the backend {key}: changing a token changes rows that must not "
            "see it, or none that see it. Use another backend or another model"
        )


def _compared(key: str, backend: Backend, oracle: Attention) -> Attention:
    """The backend's attention function, which raises where its output or gradients are not the oracle's.

    Compared layer by layer on noise in place of the model's own queries, keys and values: what a trained model attends
    to can be so one-sided that the gradients of correct kernels in bfloat16 differ by several percent.
    """

    def attention(module: nn.Module, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        *own, attention_mask = tensors
        generator = torch.Generator(own[0].device).manual_seed(0)
        noise = [
            torch.randn(each.shape, device=each.device, generator=generator).to(each).requires_grad_() for each in own
        ]
        sides = []
        with torch.enable_grad():
            for function in (backend.attention, oracle):
                output, _ = function(module, *noise, attention_mask, **options)
                wave = torch.sin(torch.arange(output.numel(), device=output.device)).view_as(output)
                sides.append(
                    (output.detach(), *torch.autograd.grad(output, noise, wave.to(output), materialize_grads=True))
                )
        allowed = max(_EPS * torch.finfo(sides[0][0].dtype).eps, _LEAST)
        for what, here, there in zip(_COMPARED, *sides, strict=True):
            error = _row_error(here, there)
            if not error <= allowed:
                raise UnsupportedModelError(
                    f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')}): under the backend {key} its "
                    f"{what} differs from attention written out by {error:.2g} of its size; expected at most "
                    f"{allowed:.2g}. It would train under another mask or on wrong gradients. Use another backend, and "
                    "please report this"
                )
        return backend.attention(module, *own, attention_mask, **options)

    return attention


def _row_error(here: Tensor, there: Tensor) -> float:
    """The largest difference of two rows, relative to the row of `there` or, where that is smaller, to its mean row."""
    here, there = here.float(), there.float()
    size = there.norm(dim=-1)
    return float(((here - there).norm(dim=-1) / size.clamp(min=float(size.mean()))).max())


def _attached_part(model: nn.Module) -> PreTrainedModel:
    """The model that was attached, inside of what was wrapped around it since."""
    names = {backend.name for backend in BACKENDS.values()}
    for module in model.modules():
        attached = isinstance(module, PreTrainedModel) and module.config._attn_implementation in names
        if attached and module._forward_pre_hooks:
            return cast(PreTrainedModel, module)
    raise UsageError(f"{type(model).__name__} has no attached model inside; call ismdata.attach before training")


def _oracle(device: torch.device, doc_start: IntArray, kv_end: IntArray) -> Attention:
    """An attention function that knows the canary's intervals and looks at nothing that the backend prepared."""
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
            output = plain_attention(query, key, value, sees.of(sliding_window), scale=scale, softcap=softcap)
        return output.transpose(1, 2).contiguous(), None

    return attention


@contextmanager
def _recorded(backend: Backend, attention: Attention | None = None) -> Iterator[list[tuple[nn.Module, int | None]]]:
    """While it lasts, the backend's calls are listed as (module, sliding window); `attention` may stand in for it."""
    calls: list[tuple[nn.Module, int | None]] = []
    function = attention or backend.attention

    def recording(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        calls.append((module, kwargs.get("sliding_window")))
        return function(module, *args, **kwargs)

    AttentionInterface.register(backend.name, recording)
    try:
        yield calls
    finally:
        AttentionInterface.register(backend.name, backend.attention)


def _check_calls(model: PreTrainedModel, calls: list[tuple[nn.Module, int | None]]) -> None:
    """Raise unless each layer called the attention function once, and those that slide said how far."""
    config = model.config.get_text_config()
    times = Counter(id(module) for module, _ in calls)
    if len(times) != config.num_hidden_layers or set(times.values()) != {1}:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {config.num_hidden_layers} layers, and {len(times)} called the attention "
            f"function, {len(calls)} times in all; expected each layer once. Some of its layers do not take the mask. "
            "Use another model"
        )
    sliding = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    told = sum(window is not None for _, window in calls)
    if sliding > told:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {sliding} sliding layers, of which {told} tell their attention function how "
            "far they slide; the others would see too much. Use another model"
        )


def _rows(backend: Backend) -> int:
    """The canary's T: at least as many as its tokens, in multiples that the backend takes; the rest is padding."""
    return -(-_TOKENS // backend.rows_multiple) * backend.rows_multiple


def _tokens(model: PreTrainedModel) -> Tensor:
    """int64[_TOKENS]: distinct tokens from all over the vocabulary where it is large enough."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    return (torch.arange(1, _TOKENS + 1, device=model.device) * max(1, vocabulary // (_TOKENS + 2))) % vocabulary


def _lengthened(tokens: Tensor, rows: int) -> Tensor:
    """int64[B, _TOKENS] -> int64[B, rows], padded with token 0."""
    return nn.functional.pad(tokens, (0, rows - tokens.shape[1]))


def _perturbed(tokens: Tensor) -> Tensor:
    """int64[1 + T, T]: the tokens, then for each place a copy with another token there."""
    copies = tokens.repeat(_TOKENS + 1, 1)
    place = torch.arange(_TOKENS, device=tokens.device)
    copies[place + 1, place] = tokens.roll(_TOKENS // 2)
    return copies


def _forward(model: PreTrainedModel, backend: Backend, tokens: Tensor, doc_start: IntArray, kv_end: IntArray) -> Tensor:
    """float32[B, _TOKENS, V]. Where a backend needs longer rows, one at a time: it compiles for one shape."""
    rows = _rows(backend)
    padding = np.arange(_TOKENS, rows, dtype=np.int32)
    doc_start, kv_end = np.concatenate([doc_start, padding]), np.concatenate([kv_end, padding + 1])
    parts = torch.split(tokens, 1 if rows > _TOKENS else len(tokens))
    with _computing(model, backend):
        logits = [
            _logits(_call(model, doc_start, kv_end, input_ids=_lengthened(part, rows)))[:, :_TOKENS] for part in parts
        ]
    return torch.cat(logits)


def _call(model: PreTrainedModel, doc_start: IntArray, kv_end: IntArray, **tensors: Tensor) -> Any:
    given = next(iter(tensors.values()))
    ends = {
        name: _on(given.device, array).expand(given.shape[:2])
        for name, array in (("doc_start", doc_start), ("kv_end", kv_end))
    }
    if glm.takes_two_positions(model):  # all tokens as context, as the model by itself has them
        first = torch.arange(1, given.shape[1] + 1, device=given.device) - ends["doc_start"]
        ends |= {"position_ids": first, "position_ids_2": torch.zeros_like(first)}
    return model(use_cache=False, **ends, **tensors)


def _on(device: torch.device, ends: IntArray) -> Tensor:
    return torch.from_numpy(ends).to(device)


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            "the model returns no logits; expected a causal language model (AutoModelForCausalLM)"
        )
    return logits.float()


def _dtype(model: PreTrainedModel, backend: Backend) -> torch.dtype:
    """What the model computes in under the backend: half-precision kernels run a wider model under autocast."""
    dtype: torch.dtype = model.dtype
    widest = model.device.type != "cpu" and backend.half_only and dtype not in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if widest else dtype


def _computing(model: PreTrainedModel, backend: Backend) -> AbstractContextManager[object]:
    return _autocast(model, _dtype(model, backend))


def _autocast(model: PreTrainedModel, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == model.dtype else torch.autocast(model.device.type, dtype)


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients and an untouched random state, all put back."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.train(False)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
