"""What the model's hook hands to a backend, what a backend is, and what every backend has to look after.

Shape legend: B samples, Q rows of the current call, K = keys in the cache + Q, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ismdata.errors import UnsupportedModelError

Made = TypeVar("Made")

#: Keyword that carries what `Backend.prepare` returned from the hook to every layer's attention function.
KEYWORD = "interval_mask"

#: What a layer may ask of its attention function that changes the result and that intervals cannot express.
_REFUSED_FEATURES = {
    "softcap": "soft-capped attention scores, which this backend cannot compute; the backend flex can",
    "s_aux": "attention sinks, which no backend computes",
    "position_bias": "an attention bias by position, which no backend computes",
}


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The keys that each row of one micro-batch sees, on the device: row q sees `[doc_start[q], kv_end[q])`."""

    #: int32[B, Q] each. Keys count over cache and current call; row q of the call is row `keys - Q + q` of them.
    doc_start: Tensor
    kv_end: Tensor
    #: int16[B, Q / 128, 4] as `masks.block_table`, or None where the batch has none.
    block_table: Tensor | None = None
    #: K.
    keys: int
    #: Whether the call fills or continues a cache (a chat's prefill, a decoded token), and so trains nothing.
    fills_cache: bool = False
    #: Further tensors of the batch, those that the backend names in `Backend.tables` and the batch has.
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Q."""
        return self.kv_end.shape[-1]

    @property
    def one_pass(self) -> bool:
        """Whether the rows are all the keys there are and nothing is cached: training, or evaluation without cache."""
        return not self.fills_cache and self.rows == self.keys

    def windowed(self, window: int | None) -> Intervals:
        """The intervals of a layer with a sliding window: row t sees the last `window` keys up to t, and on to kv_end.

        A row still sees one interval, so nothing else changes: `max(doc_start, t - window + 1)`. What was tabulated for
        the whole documents is dropped, except where the window cuts nothing because it is as long as the keys.
        """
        if window is None or window >= self.keys:
            return self
        row = torch.arange(self.keys - self.rows, self.keys, device=self.doc_start.device, dtype=self.doc_start.dtype)
        doc_start = torch.maximum(self.doc_start, row - window + 1)
        return replace(self, doc_start=doc_start, block_table=None, tables={})


class PerWindow(Generic[Made]):
    """What `make` makes of a micro-batch's intervals, once for each sliding window that layers ask for (None: none)."""

    def __init__(self, intervals: Intervals, make: Callable[[Intervals], Made]) -> None:
        self.intervals = intervals
        self._make = make
        self._made: dict[int | None, Made] = {}

    def of(self, window: int | None) -> Made:
        if window is not None and window >= self.intervals.keys:
            window = None
        if window not in self._made:
            self._made[window] = self._make(self.intervals.windowed(window))
        return self._made[window]


def _never(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention over intervals."""

    #: The name in transformers' AttentionInterface. It must not contain "flash", "sdpa" or "flex_attention": dispatch
    #: inside transformers looks for these as substrings and would treat the function as its own.
    name: str
    #: Once a micro-batch: what every layer gets as the keyword `interval_mask`.
    prepare: Callable[[Intervals], Any]
    #: An attention function as transformers calls it: (module, query [B, H, Q, D], key, value [B, H of keys, K, D],
    #: attention_mask (always None), *, interval_mask, scaling, dropout, sliding_window, …) -> output [B, Q, H, D], None
    attention: Callable[..., tuple[Tensor, Tensor | None]]
    #: Why it cannot run on this device (naming what is missing), None where it can.
    missing: Callable[[torch.device], str | None] = _never
    #: Why it cannot train on this device although it runs there, None where it can.
    missing_for_training: Callable[[torch.device], str | None] = _never
    #: Names of further tensors of a batch that it looks for in `Intervals.tables` (a batch may do without).
    tables: tuple[str, ...] = ()
    #: T must be a multiple of this in a pass without a cache.
    rows_multiple: int = 1
    #: Whether it computes in bfloat16 and float16 alone: a float32 model runs it under autocast.
    half_only: bool = False
    #: Whether it can compute soft-capped scores (Gemma 2).
    soft_caps: bool = False


def check_call(module: nn.Module, prepared: object, features: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, with the reason, where a layer asks for what the backend would leave out.

    `prepared` is what the layer got as `interval_mask`; `features` are the keywords that the backend did not take.
    """
    for feature, reason in _REFUSED_FEATURES.items():
        if features.get(feature) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} asks for {feature}: {reason}. Use another model")
    if prepared is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} got no {KEYWORD}: the model was entered below the one that was attached, or it "
            "does not hand its keywords down. Call the attached model itself"
        )


def check_dropout(module: nn.Module, dropout: float, backend: str) -> None:
    """Raise UnsupportedModelError where a layer in training drops attention weights, which a fused kernel cannot."""
    if dropout:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for attention dropout {dropout}, which the backend {backend} cannot "
            "compute. Set attention_dropout to 0 in the model's config, or use the backend sdpa"
        )


def check_shape(module: nn.Module, query: Tensor, key: Tensor, intervals: Intervals, window: int | None) -> None:
    """Raise UnsupportedModelError unless a layer's rows and keys are those of the intervals.

    A cache with a sliding window keeps the last `window - 1` keys only: fewer keys are right there, the last ones.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    kept = intervals.keys if window is None else min(intervals.keys, window - 1 + intervals.rows)
    if rows == intervals.rows and kept <= keys <= intervals.keys:
        return
    raise UnsupportedModelError(
        f"{type(module).__name__} has {rows} rows and {keys} keys; the mask is for {intervals.rows} and "
        f"{intervals.keys}. Static caches, and context or sequence parallelism, which cut the sequence, do not work "
        "with intervals: turn them off"
    )


def same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype: autocast's where that is on (norms of queries and keys give float32 there), else value's.

    torch's own attention does this for itself; kernels called directly do not.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)
