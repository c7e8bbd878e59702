"""The kernels of `varlen.py`: causal attention over sequences of different lengths laid end to end, with gradients.

`FlashKernel` is torch's own FlashAttention, for NVIDIA GPUs. `PlainKernel` computes the same in plain torch, on any
device and in any dtype; the tests compare the two, and CPUs run it. The backward passes use `out` and `lse` as they are
given, which may be those of a softmax over more keys than the kernel sees. Each kernel then returns its own keys' share
of that softmax's gradients (FlashAttention-2, algorithm 2).

Shape legend: R rows, H heads, G heads of keys and values (H is a multiple of G), D width of a head, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: Rows that PlainKernel computes at a time. Its memory per head is this many times the keys of a sequence.
_CHUNK = 256


class Inputs(NamedTuple):
    """Queries, keys and values, or their gradients."""

    query: Tensor  # [R, H, D]
    key: Tensor  # [R, G, D]
    value: Tensor  # [R, G, D]

    def select(self, rows: Tensor, keys: Tensor) -> Inputs:
        """The queries of some rows, and the keys and values of as many others."""
        return Inputs(
            self.query.index_select(0, rows), self.key.index_select(0, keys), self.value.index_select(0, keys)
        )


class Output(NamedTuple):
    """What attention returns."""

    out: Tensor  # [R, H, D]
    lse: Tensor  # [H, R], log-sum-exp of the scaled scores, float32 (float64 for float64)

    def select(self, rows: Tensor) -> Output:
        """The output of some rows."""
        return Output(self.out.index_select(0, rows), self.lse.index_select(1, rows))


class Sequences(NamedTuple):
    """Which keys a row sees: row t of a sequence its keys t - window + 1 … t (window None: 0 … t)."""

    borders: Tensor  # int32[N + 1]: where the sequences begin, then R
    longest: int  # rows of the longest sequence, or more
    window: int | None
    scale: float  # of the scores


class Kernel(Protocol):
    """Causal attention inside each sequence."""

    def forward(self, inputs: Inputs, sequences: Sequences) -> Output:
        """Return the output and its log-sum-exp."""

    def backward(self, gradient: Tensor, inputs: Inputs, output: Output, sequences: Sequences) -> Inputs:
        """Return the gradients of query, key and value, from the gradient of the output, [R, H, D]."""


class PlainKernel:
    """Matrix products and a softmax, one chunk of rows at a time, in float32 or wider."""

    def forward(self, inputs: Inputs, sequences: Sequences) -> Output:
        """Return the output and its log-sum-exp."""
        query, key, value = _widened(*inputs)
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0])
        for rows, keys in _chunks(sequences):
            scores = _scores(query, key, rows, keys, sequences)
            lse[:, rows] = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - lse[:, rows, None])
            out[rows] = _ungrouped(_grouped(weights, key.shape[1]) @ value[keys].transpose(0, 1), query.shape[1])
        return Output(out.to(inputs.query.dtype), lse)

    def backward(self, gradient: Tensor, inputs: Inputs, output: Output, sequences: Sequences) -> Inputs:
        """Return the gradients of query, key and value."""
        query, key, value, gradient, out = _widened(*inputs, gradient, output.out)
        lse = output.lse
        heads, groups = query.shape[1], key.shape[1]
        of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        delta = (gradient * out).sum(-1).T  # [H, R]
        for rows, keys in _chunks(sequences):
            weights = torch.exp(_scores(query, key, rows, keys, sequences) - lse[:, rows, None])  # [H, rows, keys]
            outer = _grouped(gradient[rows].transpose(0, 1), groups)  # [G, H / G * rows, D]
            of_weights = (outer @ value[keys].permute(1, 2, 0)).view_as(weights)
            of_scores = _grouped(weights * (of_weights - delta[:, rows, None]) * sequences.scale, groups)
            of_query[rows] = _ungrouped(of_scores @ key[keys].transpose(0, 1), heads)
            of_key[keys] += (of_scores.mT @ _grouped(query[rows].transpose(0, 1), groups)).transpose(0, 1)
            of_value[keys] += (_grouped(weights, groups).mT @ outer).transpose(0, 1)
        gradients = Inputs(of_query, of_key, of_value)
        return Inputs(*(found.to(given.dtype) for found, given in zip(gradients, inputs, strict=True)))


class FlashKernel:
    """torch's FlashAttention for float16 and bfloat16, D a multiple of 8 up to 256.

    These two operators are what `torch.nn.attention.varlen` calls, with one signature since torch 2.8, and what
    `activate_flash_attention_impl` replaces by FlashAttention 3. Nothing here waits for the device. They are
    deterministic under `torch.use_deterministic_algorithms(True)`, as torch's own FlashAttention is.
    """

    def forward(self, inputs: Inputs, sequences: Sequences) -> Output:
        """Return the output and its log-sum-exp."""
        lengths, options = _flash_arguments(sequences)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *inputs,
            *lengths,
            0.0,  # dropout
            sequences.window is None,  # causal
            False,  # no debug mask
            **options,
        )
        return Output(out, lse)

    def backward(self, gradient: Tensor, inputs: Inputs, output: Output, sequences: Sequences) -> Inputs:
        """Return the gradients of query, key and value."""
        lengths, options = _flash_arguments(sequences)
        return Inputs(
            *torch.ops.aten._flash_attention_backward(
                gradient,
                *inputs,
                *output,
                *lengths,
                0.0,  # dropout
                sequences.window is None,  # causal
                inputs.query.new_zeros(2, dtype=torch.uint64),  # the random state, unused without dropout
                inputs.query.new_empty(0),
                **options,
            )
        )


def _flash_arguments(sequences: Sequences) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The lengths of queries and keys, and the keyword arguments of FlashAttention's operators."""
    # For a longest length of 1 FlashAttention takes a code path for decoding, whose outputs have other shapes.
    longest = max(sequences.longest, 2)
    options: dict[str, Any] = {"scale": sequences.scale}
    if sequences.window is not None:  # FlashAttention counts the keys to the left of a row, without the row's own
        options |= {"window_size_left": sequences.window - 1, "window_size_right": 0}
    return (sequences.borders, sequences.borders, longest, longest), options


def _chunks(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    """Chunks of at most _CHUNK rows of one sequence, and the keys that some of their rows see."""
    window = sequences.window
    for begin, end in pairwise(sequences.borders.tolist()):
        for first in range(begin, end, _CHUNK):
            last = min(first + _CHUNK, end)
            yield slice(first, last), slice(begin if window is None else max(begin, first - window + 1), last)


def _scores(query: Tensor, key: Tensor, rows: slice, keys: slice, sequences: Sequences) -> Tensor:
    """Scaled scores [H, rows, keys], -inf where a row does not see a key."""
    query, key = query[rows], key[keys]
    groups = key.shape[1]
    scores = (_grouped(query.transpose(0, 1), groups) @ key.permute(1, 2, 0)) * sequences.scale
    scores = scores.view(query.shape[1], len(query), len(key))
    row = torch.arange(rows.start, rows.stop, device=key.device)[:, None]
    at = torch.arange(keys.start, keys.stop, device=key.device)
    unseen = at > row
    if sequences.window is not None:
        unseen |= at <= row - sequences.window
    return scores.masked_fill_(unseen, -torch.inf)


def _grouped(of_heads: Tensor, groups: int) -> Tensor:
    """[H, rows, …] as [G, H / G * rows, …], so that heads with the same keys are adjacent."""
    return of_heads.reshape(groups, -1, of_heads.shape[-1])


def _ungrouped(of_groups: Tensor, heads: int) -> Tensor:
    """[G, H / G * rows, D] as [rows, H, D]."""
    return of_groups.reshape(heads, -1, of_groups.shape[-1]).transpose(0, 1)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 or wider."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
