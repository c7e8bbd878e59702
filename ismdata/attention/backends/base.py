"""What a backend is, what it is given, and the checks that every backend needs.

Shape legend: B samples, Q rows of the current call, K = keys in the cache + Q, H heads, G heads of keys and values,
D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ismdata.errors import UnsupportedModelError

Mask = TypeVar("Mask")

#: The keyword that carries what `Backend.prepare` returned from the model's hook to each layer's attention function.
KEYWORD = "interval_mask"

#: Keywords of transformers' attention functions that change the result and that no backend supports.
_UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "an attention bias by position"}


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The keys that each row of a micro-batch sees, on the device: row q sees `[doc_start[q], kv_end[q])`.

    Args:
        doc_start: int32[B, Q]. Keys are counted over the cache and the current call; row q of the call is key
            `keys - Q + q`.
        kv_end: int32[B, Q].
        block_table: int16[B, Q / 128, 4] as `masks.block_table` returns it, if the batch has it.
        keys: K.
        fills_cache: Whether the call fills or continues a cache (a prefill, a decoded token), and so trains nothing.
        logits_to_keep: The call's own, of which the model keeps the last rows. Layers that share keys with earlier ones
            may then compute these rows only (Gemma 4).
        tables: The tensors of the batch that the backend names in `Backend.tables`.
    """

    doc_start: Tensor
    kv_end: Tensor
    block_table: Tensor | None = None
    keys: int
    fills_cache: bool = False
    logits_to_keep: int = 0
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Q."""
        return self.kv_end.shape[-1]

    @property
    def one_pass(self) -> bool:
        """Whether the rows are all the keys and nothing is cached: training, or evaluation without a cache."""
        return not self.fills_cache and self.rows == self.keys

    def windowed(self, window: int | None) -> Intervals:
        """The intervals of a layer with a sliding window: row t sees the last `window` keys up to t, and on to kv_end.

        A row still sees one interval: only doc_start becomes `max(doc_start, t - window + 1)`. Tables of the whole
        documents no longer hold and are dropped, unless the window is as long as the keys.
        """
        if window is None or window >= self.keys:
            return self
        row = torch.arange(self.keys - self.rows, self.keys, device=self.doc_start.device, dtype=self.doc_start.dtype)
        doc_start = torch.maximum(self.doc_start, row - window + 1)
        return replace(self, doc_start=doc_start, block_table=None, tables={})


class Prepared(Protocol):
    """What `Backend.prepare` returns."""

    @property
    def intervals(self) -> Intervals:
        """The micro-batch's intervals."""


class PerWindow(Generic[Mask]):
    """The masks of a micro-batch, one for each sliding window that layers have (None: no window), built once each.

    Args:
        intervals: The micro-batch's intervals.
        make: Builds a mask from the intervals of one window.
    """

    def __init__(self, intervals: Intervals, make: Callable[[Intervals], Mask]) -> None:
        self.intervals = intervals
        self._make = make
        self._masks: dict[int | None, Mask] = {}

    def for_window(self, window: int | None) -> Mask:
        """The mask of the layers with this window."""
        if window is not None and window >= self.intervals.keys:
            window = None
        if window not in self._masks:
            self._masks[window] = self._make(self.intervals.windowed(window))
        return self._masks[window]


class LayerCall(NamedTuple):
    """One layer's call of its attention function."""

    module: nn.Module
    query: Tensor  # [B, H, Q, D]
    key: Tensor  # [B, G, K, D]
    value: Tensor  # [B, G, K, D of values]
    mask: Any  # what `Backend.prepare` returned
    scaling: float | None  # of the scores; None: 1 / sqrt(D)
    dropout: float  # of the attention weights
    window: int | None  # the layer's sliding window
    softcap: float | None  # of the scores (Gemma 2)

    @property
    def intervals(self) -> Intervals:
        """The micro-batch's intervals."""
        intervals: Intervals = self.mask.intervals
        return intervals

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


def _always(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention over intervals.

    Args:
        name: The name in transformers' AttentionInterface. It must not contain "flash", "sdpa" or "flex_attention":
            transformers looks for these substrings and would treat the function as its own.
        prepare: Called once per micro-batch. Each layer gets the result as the keyword `interval_mask`.
        compute: Computes a layer's attention, [B, Q, H, D of values].
        missing: Returns what the backend lacks to run on a device, None if nothing.
        missing_for_training: Returns what it lacks to train on a device on which it runs, None if nothing.
        tables: Tensors of a batch that it reads from `Intervals.tables`. A batch may lack them.
        rows_multiple: T must be a multiple of this in a pass without a cache.
        half_only: Whether it computes in bfloat16 and float16 only; a float32 model runs it under autocast.
        soft_caps: Whether it supports soft-capped scores (Gemma 2).
    """

    name: str
    prepare: Callable[[Intervals], Prepared]
    compute: Callable[[LayerCall], Tensor]
    missing: Callable[[torch.device], str | None] = _always
    missing_for_training: Callable[[torch.device], str | None] = _always
    tables: tuple[str, ...] = ()
    rows_multiple: int = 1
    half_only: bool = False
    soft_caps: bool = False

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Compute a layer's attention: the function that transformers' AttentionInterface calls.

        Args:
            module: The layer's attention module.
            query: [B, H, Q, D].
            key: [B, G, K, D].
            value: [B, G, K, D of values].
            attention_mask: None, since no mask function is registered for a backend; else the layer's own mask or bias.
            options: `interval_mask`, `scaling`, `dropout`, `sliding_window`, `softcap`, and others.

        Returns:
            The output [B, Q, H, D of values], and None in place of the attention weights.

        Raises:
            UnsupportedModelError: if the layer requires what the backend cannot compute.
        """
        call = LayerCall(
            module,
            query,
            key,
            value,
            mask=options.get(KEYWORD),
            scaling=options.get("scaling"),
            dropout=options.get("dropout", 0.0),
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
        )
        if attention_mask is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} gives its attention a mask or a bias of its own, which the backend would "
                "ignore. Use another model"
            )
        _check_options(module, options, soft_caps=self.soft_caps)
        _check_shape(call)
        return self.compute(call), None


def _check_options(module: nn.Module, options: Mapping[str, Any], *, soft_caps: bool) -> None:
    """Raise UnsupportedModelError for an option that the backend would ignore, or without the prepared mask."""
    name = type(module).__name__
    if options.get("softcap") is not None and not soft_caps:
        raise UnsupportedModelError(
            f"{name} requires softcap (soft-capped attention scores), which this backend cannot compute. Use the "
            "backend flex"
        )
    for option, what in _UNSUPPORTED.items():
        if options.get(option) is not None:
            raise UnsupportedModelError(
                f"{name} requires {option} ({what}), which no backend computes. Use another model"
            )
    if options.get(KEYWORD) is None:
        raise UnsupportedModelError(
            f"{name} got no {KEYWORD}: a part of the attached model was called instead of the model, or its `forward` "
            "(peft's AdaLoRA and adaption prompts do so), or the model does not pass its keywords on to its layers. "
            "Call the attached model itself; of peft, use LoRA"
        )


def _check_shape(call: LayerCall) -> None:
    """Raise UnsupportedModelError unless a layer's rows and keys are those of the intervals.

    A cache with a sliding window keeps the last `window - 1` keys only, so such a layer may have fewer keys.
    """
    intervals, rows, keys = call.intervals, call.query.shape[-2], call.key.shape[-2]
    kept = intervals.keys if call.window is None else min(intervals.keys, call.window - 1 + intervals.rows)
    whole = rows == intervals.rows or (intervals.fills_cache and rows == intervals.logits_to_keep)
    if whole and kept <= keys <= intervals.keys:
        return
    dropped = call.window is None and keys < intervals.keys and rows == intervals.rows
    advice = (
        "The cache drops keys for a sliding window of the config, which the attention does not apply: pass "
        "past_key_values=transformers.DynamicCache(), which keeps them"
        if dropped
        else "Turn off static caches, and context or sequence parallelism, which split the sequence"
    )
    raise UnsupportedModelError(
        f"{type(call.module).__name__} has {rows} rows and {keys} keys; the mask is for {intervals.rows} rows and "
        f"{intervals.keys} keys. {advice}"
    )


def check_dropout(call: LayerCall, backend: str) -> None:
    """Raise UnsupportedModelError for dropout of attention weights, which a fused kernel cannot compute.

    Args:
        call: The layer's call.
        backend: The backend's name, for the message.
    """
    if call.dropout:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} requires attention dropout {call.dropout}, which the backend {backend} "
            "cannot compute. Set attention_dropout to 0 in the model's config, or use the backend sdpa"
        )


def same_dtype(call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
    """Cast query, key and value to one dtype: autocast's if it is on, else the values'.

    Under autocast, norms of queries and keys return float32. torch's own attention casts; kernels called directly do
    not.

    Args:
        call: The layer's call.

    Returns:
        Query, key and value.
    """
    kind = call.query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else call.value.dtype
    return call.query.to(dtype), call.key.to(dtype), call.value.to(dtype)
