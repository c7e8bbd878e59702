"""The backend `sdpa`: torch's scaled dot product attention under a dense mask. Runs anywhere, quadratic in T."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ismdata.attention.backends.base import Backend, Intervals, LayerCall, PerWindow

#: More rows than this raise a warning: the mask takes 64 MiB per sample here, four times that at twice the length.
MANY_ROWS = 8192


def dense_mask(intervals: Intervals) -> Tensor:
    """The intervals as a mask, bool[B, 1, Q, K], True where a row sees a key.

    Args:
        intervals: A micro-batch's; the block table is not used.
    """
    key = torch.arange(intervals.keys, device=intervals.doc_start.device)
    return ((key >= intervals.doc_start[..., None]) & (key < intervals.kv_end[..., None]))[:, None]


def prepare_dense(intervals: Intervals) -> PerWindow[Tensor]:
    """The dense mask of each sliding window. Warns if it is large."""
    if intervals.rows > MANY_ROWS:
        mask = len(intervals.kv_end) * intervals.rows * intervals.keys / 2**30
        warnings.warn(
            f"the backend sdpa builds a dense mask of {mask:.2f} GiB for {len(intervals.kv_end)} x {intervals.rows} "
            "tokens and skips no work; it is meant for short sequences and for checks. Use flex or varlen on a GPU",
            stacklevel=2,
        )
    return PerWindow(intervals, dense_mask)


def dense_mask_of(call: LayerCall) -> Tensor:
    """The dense mask of a layer's rows and keys, bool[B, 1, rows, keys].

    A sliding layer's cache has the last keys only, and a layer may compute the last rows only (`_check_shape`).
    """
    mask: Tensor = call.mask.for_window(call.window)
    return mask[..., -call.query.shape[-2] :, -call.key.shape[-2] :]


def dense_attention(call: LayerCall) -> Tensor:
    """A layer's attention by torch's scaled dot product attention, [B, Q, H, D of values]."""
    mask = dense_mask_of(call)
    output: Tensor
    output, _ = sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=False,
    )
    return output


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention in plain matrix products: the canary's reference, and soft-capped scores with a cache.

    Args:
        query: [B, H, Q, D].
        key: [B, G, K, D].
        value: [B, G, K, D of values].
        sees: bool[B or 1, 1, Q, K], with at least one key per row.
        scale: Of the scores. Scores and softmax are in float32 or wider.
        softcap: Scores become softcap * tanh(score / softcap).

    Returns:
        [B, H, Q, D of values], in the dtype of `value`.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    score = (query.to(precise) @ key.to(precise).transpose(-1, -2)) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    weight = score.masked_fill(~sees, float("-inf")).softmax(-1)
    return (weight @ value.to(precise)).to(value.dtype)


SDPA = Backend(name="ismdata_dense", prepare=prepare_dense, compute=dense_attention)
