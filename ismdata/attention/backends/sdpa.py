"""The `sdpa` backend: torch's scaled dot product attention under a dense mask. Right everywhere, quadratic in T."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ismdata.attention.backends.base import Backend, Intervals, PerWindow, check_call, check_shape

#: Rows from which a dense mask is worth a warning: 64 MiB a sample, four times that at twice the length.
MANY_ROWS = 8192


def dense_mask(intervals: Intervals) -> Tensor:
    """bool[B, 1, Q, K], True where a row sees a key. The block table is not needed."""
    key = torch.arange(intervals.keys, device=intervals.doc_start.device)
    return ((key >= intervals.doc_start[..., None]) & (key < intervals.kv_end[..., None]))[:, None]


def prepare_dense(intervals: Intervals) -> PerWindow[Tensor]:
    """The dense mask of each sliding window. Warns where rows are so many that the mask weighs."""
    if intervals.rows > MANY_ROWS:
        mask = len(intervals.kv_end) * intervals.rows * intervals.keys / 2**30
        warnings.warn(
            f"the sdpa backend holds a dense mask of {mask:.2f} GiB for {len(intervals.kv_end)} x {intervals.rows} "
            "tokens and skips no work; expected it for short sequences and checks. Use flex or varlen on a GPU",
            stacklevel=2,
        )
    return PerWindow(intervals, dense_mask)


def dense_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, H of keys, K, D]
    value: Tensor,
    attention_mask: Tensor | None,  # always None: no mask function is registered for a backend
    *,
    interval_mask: PerWindow[Tensor] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """torch's scaled dot product attention under the interval mask. Raises UnsupportedModelError, with the reason."""
    check_call(module, interval_mask, features)
    assert interval_mask is not None
    check_shape(module, query, key, interval_mask.intervals, sliding_window)
    mask = interval_mask.of(sliding_window)[..., -key.shape[-2] :]
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False
    )
    return output, None


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention written out, [B, H, Q, D]: the canary's oracle, and what soft-capped scores need beside a cache.

    sees: bool[B or 1, 1, Q, K], at least one key a row. Scores and softmax are in float32 at least.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    score = (query.to(precise) @ key.to(precise).transpose(-1, -2)) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    weight = score.masked_fill(~sees, float("-inf")).softmax(-1)
    return (weight @ value.to(precise)).to(value.dtype)


SDPA = Backend(name="ismdata_dense", prepare=prepare_dense, attention=dense_attention)
