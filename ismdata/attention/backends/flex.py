"""The `flex` backend: FlexAttention over the shards' block tables, which skips what no row of a block sees.

Linear memory, and work in proportion to the visible blocks. One BlockMask a micro-batch (and sliding window), one
compiled kernel for all micro-batches of a shape. The first call of a shape compiles for some seconds.

Shape legend: B samples, T = seq_len, N = T / 128 blocks, H heads, D width of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ismdata.attention.backends.base import (
    Backend,
    Intervals,
    PerWindow,
    check_call,
    check_dropout,
    check_shape,
    same_dtype,
)
from ismdata.attention.backends.sdpa import dense_attention, plain_attention, prepare_dense
from ismdata.errors import UnsupportedModelError, UsageError
from ismdata.masks import BLOCK_SIZE

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

#: Rows from which a CPU compiles its kernel: below, the compiler takes longer than all that the kernel would save.
COMPILED_CPU_ROWS = 1024

#: Kernels of different shapes that one process may compile before it is an error: torch would go on without kernels,
#: in memory quadratic in T. A training needs a few: full and last batch, evaluation, the canary.
MOST_KERNELS = 64

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def block_table(doc_start: Tensor, kv_end: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """`masks.block_table` on the device: int32[B, T] each -> int32[B, N, 4]."""
    lo = doc_start.view(len(doc_start), -1, block_size)
    hi = kv_end.view(len(kv_end), -1, block_size)
    columns = (
        lo.amin(-1) // block_size,
        (hi.amax(-1) + block_size - 1) // block_size,
        (lo.amax(-1) + block_size - 1) // block_size,
        hi.amin(-1) // block_size,
    )
    return torch.stack(columns, dim=-1).to(torch.int32)


def block_lists(table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block table [B, N, 4] as FlexAttention's lists of key blocks for each block row: partly and fully visible ones.

    Returns how many there are, int32[B, 1, N], and which, int32[B, 1, N, N] (meaningless past their number): first of
    the partial, then of the full ones. Visible and full blocks are one range each, the full inside the visible, so the
    partial ones are what stands before and after: `masks.block_table` has the closed form.
    """
    visible_lo, visible_hi, full_lo, full_hi = table.to(torch.int32)[:, None].unbind(-1)  # [B, 1, N] each
    is_any = full_hi > full_lo
    full_lo = torch.where(is_any, full_lo, visible_hi)
    full_hi = torch.where(is_any, full_hi, visible_hi)
    before = full_lo - visible_lo
    place = torch.arange(table.shape[1], device=table.device, dtype=torch.int32)  # [N]
    last = table.shape[1] - 1
    is_before = place < before[..., None]
    partial = place + torch.where(is_before, visible_lo[..., None], (full_hi - before)[..., None])
    full = place + full_lo[..., None]
    return (
        before + visible_hi - full_hi,
        partial.clamp(max=last),
        full_hi - full_lo,
        full.clamp(max=last),
    )


def interval_mask_mod(doc_start: Tensor, kv_end: Tensor) -> MaskMod:
    """The mask inside partial blocks. The only place that makes one: other code would compile other kernels."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= doc_start[b, q]) & (k < kv_end[b, q])

    return mask_mod


@functools.lru_cache
def softcap_score_mod(softcap: float) -> ScoreMod:
    """Gemma 2's soft-capped scores. One function a cap, since another function would compile another kernel."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(intervals: Intervals) -> BlockMask:
    """The BlockMask of a micro-batch, from its block table or, where it has none, from the intervals; no host wait."""
    table = intervals.block_table
    if table is None:
        table = block_table(intervals.doc_start, intervals.kv_end)
    partial_number, partial, full_number, full = block_lists(table)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=partial_number,
        kv_indices=partial,
        full_kv_num_blocks=full_number,
        full_kv_indices=full,
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=interval_mask_mod(intervals.doc_start, intervals.kv_end),
        seq_lengths=(intervals.rows, intervals.keys),
    )


def prepare_flex(intervals: Intervals) -> PerWindow[Any]:
    """Block masks of a pass over whole sequences; dense masks of a call with a cache, which has few rows."""
    return PerWindow(intervals, block_mask) if intervals.one_pass else prepare_dense(intervals)


def flex_interval_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, H of keys, K, D]
    value: Tensor,
    attention_mask: Tensor | None,  # always None: no mask function is registered for a backend
    *,
    interval_mask: PerWindow[Any] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """FlexAttention under the interval mask; a call with a cache (chat) is computed densely instead.

    On a CPU this is for inference: the backward pass raises. Raises UnsupportedModelError, with the reason.
    """
    check_call(module, interval_mask, features)
    check_dropout(module, dropout, "flex")
    assert interval_mask is not None
    intervals = interval_mask.intervals
    check_shape(module, query, key, intervals, sliding_window)
    made = interval_mask.of(sliding_window)
    if not intervals.one_pass and softcap is None:
        return dense_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            interval_mask=interval_mask,
            scaling=scaling,
            sliding_window=sliding_window,
        )
    query, key, value = same_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not intervals.one_pass:
        output = plain_attention(query, key, value, made[..., -key.shape[-2] :], scale=scale, softcap=softcap)
    else:
        attend = _ForwardOnly.apply if query.device.type == "cpu" else _flex
        output = attend(query, key, value, made, scale, None if softcap is None else softcap_score_mod(softcap))
    return output.transpose(1, 2).contiguous(), None


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, score_mod: ScoreMod | None
) -> Tensor:
    """[B, H, T, D]: FlexAttention, compiled where that pays."""
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scale}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if torch.compiler.is_compiling():  # part of a kernel that someone else compiles
        return cast(Tensor, flex_attention(query, key, value, **options))
    if query.device.type == "cpu" and not _compiles_on_cpu(query):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            return cast(Tensor, flex_attention(query, key, value, **options))
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_KERNELS):
            return _compiled()(query, key, value, **options)
    except FailOnRecompileLimitHit as error:
        raise UsageError(
            f"the backend flex compiled {MOST_KERNELS} kernels in this process, the last for {list(query.shape)} "
            "(samples, heads, tokens, width): batches keep changing their shape. Keep seq_len and batch size fixed "
            "(drop_last=True), or use another backend"
        ) from error


def _compiles_on_cpu(query: Tensor) -> bool:
    """Where torch's own, slower and quadratic, FlexAttention is no choice: many rows, in a dtype that compiles."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return query.shape[-2] >= COMPILED_CPU_ROWS and query.dtype in _CPU_DTYPES and compiler is not None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One for all layers and models. A whole graph or an error: torch must not fall back to the quadratic path."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False, fullgraph=True))


class _ForwardOnly(torch.autograd.Function):
    """FlexAttention on a CPU, where torch has its forward pass alone and refuses inputs that could want gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        return _flex(query.detach(), key.detach(), value.detach(), *others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedModelError(f"gradients were asked of the backend flex: {_NO_GRADIENTS}")


_NO_GRADIENTS = "FlexAttention has no backward pass on a CPU. Use the backend sdpa there, or train on a GPU"


def _missing(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"FlexAttention was tried with CUDA devices and CPUs alone; found {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is false)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing, with which FlexAttention compiles its kernels"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton's kernels need a GPU of compute capability 7.0 or more"
    return None


def _missing_for_training(device: torch.device) -> str | None:
    return _NO_GRADIENTS if device.type == "cpu" else None


FLEX = Backend(
    name="ismdata_flex",
    prepare=prepare_flex,
    attention=flex_interval_attention,
    missing=_missing,
    missing_for_training=_missing_for_training,
    rows_multiple=BLOCK_SIZE,
    soft_caps=True,
)
