"""The backend `varlen`: any of the three masks as two passes of causal attention over sequences of different lengths.

1. Causal attention inside each document: what each row sees up to itself.
2. For the rows of a context block, what they see beyond themselves, up to the block's end. In reversed order this is
   causal attention again (`masks/varlen_tables.py`). `causal` has no such rows.
3. The two are one softmax over both sets of keys. With the log-sum-exps l1 and l2 of the passes,
   out = out1 + sigmoid(l2 - l1) (out2 - out1) and lse = log(exp l1 + exp l2).

The backward pass gives the merged out and lse to both kernels' backward passes and adds the gradients: with them each
kernel computes the weights of the merged softmax, so the merge itself need not be differentiated. Both passes together
compute exactly the mask's pairs of rows and keys. Rows that see only themselves (padding) are in small sequences of
their own in pass 1 and get their own value afterwards; no other row shares a sequence with them.

Shape legend: B samples, T rows of each, R = B * T rows laid end to end, P rows of pass 2, S rows that see only
themselves, N documents, M context blocks, H heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ismdata.attention.backends.base import Backend, Intervals, LayerCall, PerWindow, check_dropout, same_dtype
from ismdata.attention.backends.sdpa import dense_attention, prepare_dense
from ismdata.attention.backends.varlen_kernels import FlashKernel, Inputs, Kernel, Output, PlainKernel, Sequences
from ismdata.errors import UnsupportedModelError
from ismdata.masks import varlen_tables

#: FlashAttention's limits: the widest head, what its width must be a multiple of, and the lowest compute capability.
_MAX_WIDTH, _WIDTH_MULTIPLE, _CAPABILITY = 256, 8, (8, 0)


class Index(NamedTuple):
    """`varlen_tables.Tables` as tensors on the tokens' device."""

    documents: Tensor  # int32[N + 1]
    alone: Tensor  # int64[S]
    rows: Tensor  # int64[P]
    keys: Tensor  # int64[P], rows + 1
    blocks: Tensor  # int32[M + 1]
    longest_document: int
    longest_block: int

    def passes(self, window: int | None, scale: float) -> tuple[Sequences, Sequences]:
        """The documents of pass 1 and the context blocks of pass 2. A window narrows what is before a row only."""
        return (
            Sequences(self.documents, self.longest_document, window, scale),
            Sequences(self.blocks, self.longest_block, None, scale),
        )


@dataclass(frozen=True, kw_only=True)
class TwoPasses:
    """What each layer of a micro-batch is given."""

    intervals: Intervals
    index: Index


@torch.compiler.disable  # type: ignore[untyped-decorator]
def prepare(intervals: Intervals) -> TwoPasses | PerWindow[Tensor]:
    """Prepare the two passes of a micro-batch; for a call with a cache, which trains nothing, the dense mask.

    The Collator's tables are used as they are, without waiting for the device. If the batch has none, or was split or
    joined since, they are computed from the intervals, which waits for the device once.

    Args:
        intervals: The micro-batch's.

    Returns:
        What `varlen_attention` takes as the call's mask.

    Raises:
        UsageError: for intervals of none of the three masks.
    """
    if not intervals.one_pass:
        return prepare_dense(intervals)
    batch = intervals.tables if _fits(intervals) else _compute_tables(intervals)
    documents, alone, rows, blocks, longest = (batch[name] for name in varlen_tables.NAMES)
    rows = rows.long()
    index = Index(documents, alone.long(), rows, rows + 1, blocks, longest.shape[2], longest.shape[3])
    return TwoPasses(intervals=intervals, index=index)


def _fits(intervals: Intervals) -> bool:
    """Whether the batch has tables, and they are of the batch as it is now.

    They are complete if each sample has a document or more, and have a dimension of as many rows as the intervals.
    """
    tables = intervals.tables
    if not all(name in tables for name in varlen_tables.NAMES):
        return False
    longest = tables["varlen_longest"]
    complete = len(tables["varlen_documents"]) > len(intervals.kv_end)
    return complete and longest.dim() == 4 and longest.shape[1] == intervals.kv_end.numel()


def _compute_tables(intervals: Intervals) -> dict[str, Tensor]:
    tables = varlen_tables.tables(intervals.doc_start.cpu().numpy(), intervals.kv_end.cpu().numpy())
    device = intervals.kv_end.device
    return {name: torch.from_numpy(array).to(device) for name, array in tables.as_batch().items()}


def two_pass_attention(
    inputs: Inputs, index: Index, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Attention in two passes; its gradients are those of `two_pass_backward`.

    Args:
        inputs: Query [R, H, D], key and value [R, G, D].
        index: The micro-batch's index.
        window: A row sees at most this many keys up to itself, and on to its kv_end as before.
        scale: Of the scores; None is 1 / sqrt(D).

    Returns:
        [R, H, D].
    """
    if window is not None and window >= index.longest_document:
        window = None
    scale = inputs.query.shape[-1] ** -0.5 if scale is None else scale
    merged: tuple[Tensor, Tensor] = _forward(*inputs, *index, window, scale)
    return merged[0]


def two_pass_forward(kernel: Kernel, inputs: Inputs, index: Index, window: int | None, scale: float) -> Output:
    """Compute the merged output. The log-sum-exp of a row that sees only itself is that of its sequence in pass 1.

    Args:
        kernel: Computes a pass.
        inputs: Query [R, H, D], key and value [R, G, D].
        index: The micro-batch's index.
        window: Of pass 1.
        scale: Of the scores.

    Returns:
        Output [R, H, D] and log-sum-exp [H, R].
    """
    rows, keys, alone = index.rows, index.keys, index.alone
    documents, blocks = index.passes(window, scale)
    out, lse = kernel.forward(inputs, documents)
    if len(rows):
        ahead = kernel.forward(inputs.select(rows, keys), blocks)
        behind = Output(out, lse).select(rows)
        share = torch.sigmoid(ahead.lse - behind.lse).T[..., None]
        merged = torch.lerp(behind.out.to(share.dtype), ahead.out.to(share.dtype), share)
        out.index_copy_(0, rows, merged.to(out.dtype))
        lse.index_copy_(1, rows, torch.logaddexp(behind.lse, ahead.lse))
    if len(alone):
        value = inputs.value
        own = value.index_select(0, alone).repeat_interleave(out.shape[1] // value.shape[1], dim=1)
        out.index_copy_(0, alone, own)
    return Output(out, lse)


def two_pass_backward(
    kernel: Kernel, gradient: Tensor, inputs: Inputs, output: Output, index: Index, window: int | None, scale: float
) -> Inputs:
    """Compute the gradients of query, key and value.

    Args:
        kernel: Computes a pass.
        gradient: Of the output, [R, H, D].
        inputs: As for `two_pass_forward`.
        output: What `two_pass_forward` returned.
        index: As for `two_pass_forward`.
        window: As for `two_pass_forward`.
        scale: As for `two_pass_forward`.

    Returns:
        The gradients, in the shapes of the inputs.
    """
    rows, keys, alone = index.rows, index.keys, index.alone
    documents, blocks = index.passes(window, scale)
    gradients = kernel.backward(gradient, inputs, output, documents)
    if len(rows):
        parts = kernel.backward(gradient.index_select(0, rows), inputs.select(rows, keys), output.select(rows), blocks)
        for whole, part, at in zip(gradients, parts, (rows, keys, keys), strict=True):
            whole.index_copy_(0, at, part.add_(whole.index_select(0, at)))  # no place twice, so no atomic additions
    if len(alone):
        gradients.query.index_fill_(0, alone, 0)
        gradients.key.index_fill_(0, alone, 0)
        groups, width = inputs.value.shape[1:]
        own = gradient.index_select(0, alone).reshape(len(alone), groups, -1, width).sum(2)
        gradients.value.index_copy_(0, alone, own)
    return gradients


# The two functions as operators of torch, so that autograd, gradient checkpointing and torch.compile support them.

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
def _forward(query: Tensor, key: Tensor, value: Tensor, *passes: Any) -> tuple[Tensor, Tensor]:
    *index, window, scale = passes
    with torch.autocast(query.device.type, enabled=False):
        out, lse = two_pass_forward(_kernel(query), Inputs(query, key, value), Index(*index), window, scale)
    return out, lse


@torch.library.custom_op(
    "ismdata::varlen_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_PASSES}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *passes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value)
    *index, window, scale = passes
    with torch.autocast(query.device.type, enabled=False):
        of_query, of_key, of_value = two_pass_backward(
            _kernel(query), gradient, inputs, Output(out, lse), Index(*index), window, scale
        )
    return of_query, of_key, of_value


@_forward.register_fake
def _forward_shapes(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=lse_dtype)


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, gradient: Tensor, of_lse: None) -> tuple[Tensor | None, ...]:
    """Only the output has a gradient: the log-sum-exp is used nowhere else."""
    return *_backward(gradient, *ctx.saved_tensors, *ctx.numbers), *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def varlen_attention(call: LayerCall) -> Tensor:
    """A layer's attention in two passes, [B, T, H, D of values]. A call with a cache is computed densely."""
    if isinstance(call.mask, PerWindow):
        return dense_attention(call)
    check_dropout(call, "varlen")
    query, key, value = same_dtype(call)
    value_width = value.shape[-1]
    width = -(-max(query.shape[-1], value_width) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    if query.is_cuda:
        _check_flash(call.module, query, width)
    flat = Inputs(*(_padded_to(width, each).transpose(1, 2).flatten(0, 1) for each in (query, key, value)))
    out = two_pass_attention(flat, call.mask.index, window=call.window, scale=call.scale)
    return out[..., :value_width].reshape(len(query), -1, query.shape[1], value_width)


def _padded_to(width: int, each: Tensor) -> Tensor:
    """Pad heads to one width, which FlashAttention requires: zeros add nothing to a score or to an output."""
    return each if each.shape[-1] == width else nn.functional.pad(each, (0, width - each.shape[-1]))


def _check_flash(module: nn.Module, query: Tensor, width: int) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError(
            f"{type(module).__name__} computes its attention in {query.dtype}; FlashAttention supports float16 and "
            "bfloat16 only. Load the model in bfloat16, call it under torch.autocast, or use the backend flex or sdpa"
        )
    if width > _MAX_WIDTH:
        raise UnsupportedModelError(
            f"{type(module).__name__} has heads of width {width}; FlashAttention supports {_MAX_WIDTH} at most. "
            "Use the backend flex or sdpa"
        )


def missing(device: torch.device) -> str | None:
    """What the backend lacks to run on a device, None if nothing. CPUs compute the same in plain torch, slowly."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"varlen runs FlashAttention, which torch has for NVIDIA GPUs; found {device.type}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention (aten::_flash_attention_forward)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        found, wanted = (".".join(map(str, each)) for each in (capability, _CAPABILITY))
        return f"FlashAttention requires a GPU of compute capability {wanted} or higher; {device} has {found}"
    return None


VARLEN = Backend(
    name="ismdata_varlen",
    prepare=prepare,
    compute=varlen_attention,
    missing=missing,
    tables=varlen_tables.NAMES,
    half_only=True,
)
