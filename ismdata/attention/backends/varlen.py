"""The `varlen` backend: any of the three masks as two passes of causal attention over sequences of many lengths.

1. Causal attention inside each document: what every row sees up to itself.
2. For the rows of a context block, what they see on to the block's end: reversed, it is a causal problem again
   (`masks/varlen_tables.py`). `causal` has no such rows.
3. The two are one softmax over both sets of keys: with the log-sum-exps l1 and l2 of the passes it is
   out = out1 + sigmoid(l2 - l1) (out2 - out1), lse = log(exp l1 + exp l2).

The backward gives the merged out and lse to both kernels' backwards and adds the gradients: with them each kernel
computes the weights of the merged softmax, so nothing has to be differentiated through the merge. Both passes together
compute the mask's own pairs of rows and keys and no others. Rows that see only themselves (padding) lie in small pieces
of pass 1 and get their own value afterwards; no other row is in a piece with them, so nothing spreads from there.

Shape legend: B samples, T rows of each, R = B * T rows laid end to end, P rows of pass 2, S rows alone, N documents,
M context blocks, H heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ismdata.attention.backends.base import Backend, Intervals, PerWindow, check_call, check_shape, same_dtype
from ismdata.attention.backends.sdpa import SDPA, dense_attention
from ismdata.attention.backends.varlen_kernels import FlashKernel, Kernel, PlainKernel
from ismdata.errors import UnsupportedModelError
from ismdata.masks import varlen_tables

#: What FlashAttention computes: the widest head, the multiple of which its width has to be, and the oldest GPU.
_MAX_WIDTH, _WIDTH_MULTIPLE, _CAPABILITY = 256, 8, (8, 0)


class Index(NamedTuple):
    """`varlen_tables.Tables` on the device of the tokens, as indices of torch."""

    documents: Tensor  # int32[N + 1]
    alone: Tensor  # int64[S]
    rows: Tensor  # int64[P]
    keys: Tensor  # int64[P], rows + 1
    blocks: Tensor  # int32[M + 1]
    longest_document: int
    longest_block: int


@dataclass(frozen=True, kw_only=True)
class TwoPasses:
    """What every layer of a micro-batch gets."""

    intervals: Intervals
    index: Index


@torch.compiler.disable  # type: ignore[untyped-decorator]
def prepare(intervals: Intervals) -> TwoPasses | PerWindow[Tensor]:
    """The two passes of a micro-batch; for a call with a cache, which trains nothing, the dense mask instead.

    The Collator's tables are used as they are, without waiting for the device. Where the batch has none, or it was cut
    or joined since, they are made of the intervals: the one wait of the micro-batch. Raises UsageError for intervals
    of no mask of ours.
    """
    if not intervals.one_pass:
        prepared: PerWindow[Tensor] = SDPA.prepare(intervals)
        return prepared
    batch = intervals.tables if _fits(intervals) else _tabulated(intervals)
    documents, alone, rows, blocks, longest = (batch[name] for name in varlen_tables.NAMES)
    rows = rows.long()
    index = Index(documents, alone.long(), rows, rows + 1, blocks, longest.shape[2], longest.shape[3])
    return TwoPasses(intervals=intervals, index=index)


def _fits(intervals: Intervals) -> bool:
    """Whether the batch has tables, of as many rows as the intervals, and whole: each sample has a document or more."""
    tables = intervals.tables
    if not all(name in tables for name in varlen_tables.NAMES):
        return False
    longest = tables["varlen_longest"]
    whole = len(tables["varlen_documents"]) > len(intervals.kv_end)
    return whole and longest.dim() == 4 and longest.shape[1] == intervals.kv_end.numel()


def _tabulated(intervals: Intervals) -> dict[str, Tensor]:
    tables = varlen_tables.tables(intervals.doc_start.cpu().numpy(), intervals.kv_end.cpu().numpy())
    device = intervals.kv_end.device
    return {name: torch.from_numpy(array).to(device) for name, array in tables.as_batch().items()}


def two_pass_attention(
    query: Tensor,  # [R, H, D]
    key: Tensor,  # [R, G, D]
    value: Tensor,  # [R, G, D]
    index: Index,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention's output [R, H, D]; its gradients are those of `two_pass_backward`.

    window: a row sees no more than this many keys up to itself, and on to its kv_end as before. scale: of the scores,
    1 / sqrt(D) by default.
    """
    if window is not None and window >= index.longest_document:
        window = None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    merged: tuple[Tensor, Tensor] = _forward(query, key, value, *index, window, scale)
    return merged[0]


def two_pass_forward(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, index: Index, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The merged output [R, H, D] and log-sum-exp [H, R] (that of a row alone is its piece's, not its own)."""
    rows, keys, alone = index.rows, index.keys, index.alone
    out, lse = kernel.forward(query, key, value, index.documents, index.longest_document, window, scale)
    if len(rows):
        ahead, ahead_lse = kernel.forward(
            query.index_select(0, rows),
            key.index_select(0, keys),
            value.index_select(0, keys),
            index.blocks,
            index.longest_block,
            None,
            scale,
        )
        behind, behind_lse = out.index_select(0, rows), lse.index_select(1, rows)
        share = torch.sigmoid(ahead_lse - behind_lse).T[..., None]
        merged = torch.lerp(behind.to(share.dtype), ahead.to(share.dtype), share)
        out.index_copy_(0, rows, merged.to(out.dtype))
        lse.index_copy_(1, rows, torch.logaddexp(behind_lse, ahead_lse))
    if len(alone):
        own = value.index_select(0, alone).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        out.index_copy_(0, alone, own)
    return out, lse


def two_pass_backward(
    kernel: Kernel,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Index,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of the output and from what `two_pass_forward` returned."""
    rows, keys, alone = index.rows, index.keys, index.alone
    of_query, of_key, of_value = kernel.backward(
        gradient, query, key, value, out, lse, index.documents, index.longest_document, window, scale
    )
    if len(rows):
        parts = kernel.backward(
            gradient.index_select(0, rows),
            query.index_select(0, rows),
            key.index_select(0, keys),
            value.index_select(0, keys),
            out.index_select(0, rows),
            lse.index_select(1, rows),
            index.blocks,
            index.longest_block,
            None,
            scale,
        )
        for whole, part, at in zip((of_query, of_key, of_value), parts, (rows, keys, keys), strict=True):
            whole.index_copy_(0, at, part.add_(whole.index_select(0, at)))  # no place twice, so no atomic additions
    if len(alone):
        of_query.index_fill_(0, alone, 0)
        of_key.index_fill_(0, alone, 0)
        own = gradient.index_select(0, alone).reshape(len(alone), value.shape[1], -1, value.shape[2]).sum(2)
        of_value.index_copy_(0, alone, own)
    return of_query, of_key, of_value


# The two functions as operators of torch, so that autograd, gradient checkpointing and torch.compile know them.

_PASSES = (
    "Tensor documents, Tensor alone, Tensor rows, Tensor keys, Tensor blocks, "
    "SymInt longest_document, SymInt longest_block, SymInt? window, float scale"
)


def _kernel(query: Tensor) -> Kernel:
    return FlashKernel() if query.is_cuda else PlainKernel()


@torch.library.custom_op(
    "ismdata::varlen_forward",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_PASSES}) -> (Tensor, Tensor)",
)
def _forward(query: Tensor, key: Tensor, value: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    *index, window, scale = numbers
    with torch.autocast(query.device.type, enabled=False):
        return two_pass_forward(_kernel(query), query, key, value, Index(*index), window, scale)


@torch.library.custom_op(
    "ismdata::varlen_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_PASSES}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *index, window, scale = numbers
    with torch.autocast(query.device.type, enabled=False):
        return two_pass_backward(_kernel(query), gradient, query, key, value, out, lse, Index(*index), window, scale)


@_forward.register_fake
def _forward_shapes(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=lse_dtype)


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, gradient: Tensor, of_lse: None) -> tuple[Tensor | None, ...]:
    """The log-sum-exp leaves this file to no one, so only the output has a gradient."""
    return *_backward(gradient, *ctx.saved_tensors, *ctx.numbers), *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_keep)


def varlen_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, G, T, D]
    value: Tensor,  # [B, G, T, D of values]
    attention_mask: Tensor | None,  # always None: no mask function is registered for a backend
    *,
    interval_mask: TwoPasses | PerWindow[Tensor] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """Attention in two passes, [B, T, H, D of values]. Raises UnsupportedModelError, with the reason."""
    if isinstance(interval_mask, PerWindow):
        return dense_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            interval_mask=interval_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **features,
        )
    check_call(module, interval_mask, features)
    assert interval_mask is not None
    check_shape(module, query, key, interval_mask.intervals, sliding_window)
    if dropout:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for dropout {dropout} on attention weights, which the two passes of varlen "
            "cannot share. Set attention_dropout to 0 in the model's config, or use the backend sdpa"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = same_dtype(query, key, value)
    value_width = value.shape[-1]
    width = -(-max(query.shape[-1], value_width) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    if query.is_cuda:
        _check_flash(module, query, width)
    flat_query, flat_key, flat_value = (
        _widened_to(width, each).transpose(1, 2).flatten(0, 1) for each in (query, key, value)
    )
    out = two_pass_attention(flat_query, flat_key, flat_value, interval_mask.index, window=sliding_window, scale=scale)
    return out[..., :value_width].reshape(len(query), -1, query.shape[1], value_width), None


def _widened_to(width: int, each: Tensor) -> Tensor:
    """Heads of one width, as FlashAttention wants them: zeros add nothing to a score, and are cut off the output."""
    return each if each.shape[-1] == width else nn.functional.pad(each, (0, width - each.shape[-1]))


def _check_flash(module: nn.Module, query: Tensor, width: int) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError(
            f"{type(module).__name__} computes its attention in {query.dtype}; FlashAttention takes float16 and "
            "bfloat16 alone. Load the model in bfloat16, call it under torch.autocast, or use the backend flex or sdpa"
        )
    if width > _MAX_WIDTH:
        raise UnsupportedModelError(
            f"{type(module).__name__} has heads of width {width}; FlashAttention takes {_MAX_WIDTH} at most. "
            "Use the backend flex or sdpa"
        )


def missing(device: torch.device) -> str | None:
    """What varlen lacks on a device. A CPU lacks nothing: there plain torch does the same, slowly, for trials."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"varlen runs FlashAttention, which torch has for NVIDIA GPUs; found {device.type}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention (aten::_flash_attention_forward)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        found, wanted = (".".join(map(str, each)) for each in (capability, _CAPABILITY))
        return f"FlashAttention needs a GPU of compute capability {wanted} or more; {device} has {found}"
    return None


VARLEN = Backend(
    name="ismdata_varlen",
    prepare=prepare,
    attention=varlen_attention,
    missing=missing,
    tables=varlen_tables.NAMES,
    half_only=True,
)
