"""The backend `flex`: FlexAttention over the shards' block tables, which skips blocks that no row sees.

Its work is proportional to the number of visible blocks. There is one BlockMask per micro-batch and sliding window, and
one compiled kernel per shape of a micro-batch, which takes some seconds to compile at its first call.

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
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ismdata.attention.backends.base import (
    Backend,
    Intervals,
    LayerCall,
    PerWindow,
    check_dropout,
    same_dtype,
)
from ismdata.attention.backends.sdpa import dense_attention, dense_mask_of, plain_attention, prepare_dense
from ismdata.errors import UnsupportedModelError, UsageError
from ismdata.masks import BLOCK_SIZE

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

#: The rows from which a CPU compiles its kernel. For fewer, compiling takes longer than the kernel saves.
COMPILED_CPU_ROWS = 1024

#: How many kernels of different shapes a process may compile. Beyond that torch would run without kernels, in memory
#: quadratic in T, so it is an error. Training needs a few: full batch, last batch, evaluation, canary.
MOST_KERNELS = 64

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def block_table(doc_start: Tensor, kv_end: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """`masks.block_table` on the device.

    Args:
        doc_start: int32[B, T].
        kv_end: int32[B, T].
        block_size: Rows and keys per block.

    Returns:
        int32[B, N, 4].
    """
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
    """FlexAttention's lists of partly and of fully visible key blocks per block row, from a block table.

    Visible blocks are one range, full blocks a range inside it, and partial blocks what is left on its two sides
    (`masks.block_table` has the closed form).

    Args:
        table: [B, N, 4].

    Returns:
        The number of partial blocks, int32[B, 1, N]; which they are, int32[B, 1, N, N], of which the entries past that
        number mean nothing; the same two for full blocks.
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
    """The mask inside partial blocks. It is made here only, since another code object would compile another kernel."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= doc_start[b, q]) & (k < kv_end[b, q])

    return mask_mod


@functools.lru_cache
def softcap_score_mod(softcap: float) -> ScoreMod:
    """Gemma 2's soft-capped scores. Cached, since another function object would compile another kernel."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(intervals: Intervals) -> BlockMask:
    """The BlockMask of a micro-batch, from its block table or else its intervals, without waiting for the device."""
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
    """Block masks for a pass over whole sequences; dense masks for a call with a cache, which has few rows."""
    return PerWindow(intervals, block_mask) if intervals.one_pass else prepare_dense(intervals)


def flex_interval_attention(call: LayerCall) -> Tensor:
    """A layer's attention by FlexAttention, [B, Q, H, D of values]. A call with a cache is computed densely.

    On a CPU this is for inference only: the backward pass raises UnsupportedModelError.
    """
    check_dropout(call, "flex")
    one_pass, softcap = call.intervals.one_pass, call.softcap
    if not one_pass and softcap is None:
        return dense_attention(call)
    query, key, value = same_dtype(call)
    if one_pass:
        mask = call.mask.for_window(call.window)
        attend = _ForwardOnly.apply if query.device.type == "cpu" else _flex
        output = attend(query, key, value, mask, call.scale, None if softcap is None else softcap_score_mod(softcap))
    else:
        output = plain_attention(query, key, value, dense_mask_of(call), scale=call.scale, softcap=softcap)
    return cast(Tensor, output).transpose(1, 2).contiguous()


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, score_mod: ScoreMod | None
) -> Tensor:
    """FlexAttention, [B, H, T, D], compiled unless it is short and on a CPU."""
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scale}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if torch.compiler.is_compiling():  # the caller compiles the whole model
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
            f"the backend flex compiled {MOST_KERNELS} kernels in this process, the last for the shape "
            f"{list(query.shape)} (samples, heads, tokens, width); expected batches of few shapes. Keep seq_len and "
            "batch size fixed (drop_last=True), or use another backend"
        ) from error


def _compiles_on_cpu(query: Tensor) -> bool:
    """Whether to compile on a CPU, where torch's uncompiled FlexAttention is slow and quadratic in memory."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return query.shape[-2] >= COMPILED_CPU_ROWS and query.dtype in _CPU_DTYPES and compiler is not None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One compiled function for all layers and models. With fullgraph, torch raises instead of falling back."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False, fullgraph=True))


class _ForwardOnly(torch.autograd.Function):
    """FlexAttention on a CPU, where torch has no backward pass and refuses inputs that require gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        return _flex(query.detach(), key.detach(), value.detach(), *others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedModelError(f"the backend flex cannot compute gradients: {_NO_GRADIENTS}")


_NO_GRADIENTS = "FlexAttention has no backward pass on a CPU. Use the backend sdpa there, or train on a GPU"


def _missing(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"FlexAttention is tested on CUDA devices and CPUs only; found {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is false)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; FlexAttention compiles its kernels with it"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton's kernels require a GPU of compute capability 7.0 or higher"
    return None


def _missing_for_training(device: torch.device) -> str | None:
    return _NO_GRADIENTS if device.type == "cpu" else None


FLEX = Backend(
    name="ismdata_flex",
    prepare=prepare_flex,
    compute=flex_interval_attention,
    missing=_missing,
    missing_for_training=_missing_for_training,
    rows_multiple=BLOCK_SIZE,
    soft_caps=True,
)
