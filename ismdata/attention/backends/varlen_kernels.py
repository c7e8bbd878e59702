"""Causal attention over sequences of many lengths laid end to end, forward and backward: the kernels under `varlen.py`.

`FlashKernel` is torch's own FlashAttention, on NVIDIA GPUs. `PlainKernel` is the same arithmetic in plain torch, on any
device and in any dtype: it is what the tests compare, and what a CPU runs. Both take `out` and `lse` in the backward as
they are given, which may be those of a softmax over more keys than the kernel sees: with them each kernel gives its
keys' share of that softmax's gradients (FlashAttention-2, algorithm 2).

Shape legend: R rows, H heads, G heads of keys and values (H a multiple of G), D width of a head, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

#: Rows that PlainKernel takes at once: its memory is this many times the keys of a sequence, a head.
_CHUNK = 256


class Kernel(Protocol):
    """Row t of a sequence sees its keys t - window + 1 … t (window None: 0 … t)."""

    def forward(
        self,
        query: Tensor,  # [R, H, D]
        key: Tensor,  # [R, G, D]
        value: Tensor,  # [R, G, D]
        sequences: Tensor,  # int32[N + 1], where they begin, and R
        longest: int,  # the most rows in a sequence, or more
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """The output [R, H, D], and the log-sum-exp of the scaled scores [H, R], float32 (float64 for float64)."""

    def backward(
        self,
        gradient: Tensor,  # [R, H, D], of the output
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value."""


class PlainKernel:
    """Matrix products and a softmax, a chunk of rows at a time; in float32 for narrower dtypes."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        query, key, value, dtype = *_widened(query, key, value), query.dtype
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[1], query.shape[0])
        for rows, keys in _chunks(sequences, window):
            scores = _scores(query[rows], key[keys], rows, keys, window, scale)
            lse[:, rows] = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - lse[:, rows, None])
            out[rows] = _ungrouped(_grouped(weights, key.shape[1]) @ value[keys].transpose(0, 1), query.shape[1])
        return out.to(dtype), lse

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtypes = query.dtype, key.dtype, value.dtype
        query, key, value, gradient, out = _widened(query, key, value, gradient, out)
        heads, groups = query.shape[1], key.shape[1]
        of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        delta = (gradient * out).sum(-1).T  # [H, R]
        for rows, keys in _chunks(sequences, window):
            scores = _scores(query[rows], key[keys], rows, keys, window, scale)
            weights = torch.exp(scores - lse[:, rows, None])  # [H, rows, keys]
            outer = _grouped(gradient[rows].transpose(0, 1), groups)  # [G, H / G * rows, D]
            of_weights = (outer @ value[keys].permute(1, 2, 0)).view_as(weights)
            of_scores = _grouped(weights * (of_weights - delta[:, rows, None]) * scale, groups)
            of_query[rows] = _ungrouped(of_scores @ key[keys].transpose(0, 1), heads)
            of_key[keys] += (of_scores.mT @ _grouped(query[rows].transpose(0, 1), groups)).transpose(0, 1)
            of_value[keys] += (_grouped(weights, groups).mT @ outer).transpose(0, 1)
        return of_query.to(dtypes[0]), of_key.to(dtypes[1]), of_value.to(dtypes[2])


class FlashKernel:
    """torch's FlashAttention for float16 and bfloat16, D a multiple of 8 up to 256.

    These two operators are what `torch.nn.attention.varlen` calls, with one signature from torch 2.8 on, and what
    `activate_flash_attention_impl` puts FlashAttention 3 under. They work asynchronously: nothing here waits for the
    device. Deterministic under `torch.use_deterministic_algorithms(True)`, as torch's own FlashAttention is.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        longest = _at_least_two(longest)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(query, key, value, sequences, sequences, longest, longest),
            0.0,  # dropout
            window is None,  # causal
            False,  # no debug mask
            scale=scale,
            **_flash_window(window),
        )
        return out, lse

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Tensor,
        longest: int,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        longest = _at_least_two(longest)
        of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
            *(gradient, query, key, value, out, lse, sequences, sequences, longest, longest),
            0.0,  # dropout
            window is None,  # causal
            query.new_zeros(2, dtype=torch.uint64),  # the state of random numbers, unused without dropout
            query.new_empty(0),
            scale=scale,
            **_flash_window(window),
        )
        return of_query, of_key, of_value


def _at_least_two(longest: int) -> int:
    """Told that sequences have one row, FlashAttention takes a path for decoding, of other shapes."""
    return max(longest, 2)


def _flash_window(window: int | None) -> dict[str, int]:
    """FlashAttention counts the keys to the left of a row, without its own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _chunks(sequences: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Rows of one sequence, a few at a time, and the keys that some of them see."""
    borders = sequences.tolist()
    for begin, end in pairwise(borders):
        for first in range(begin, end, _CHUNK):
            last = min(first + _CHUNK, end)
            yield slice(first, last), slice(begin if window is None else max(begin, first - window + 1), last)


def _scores(query: Tensor, key: Tensor, rows: slice, keys: slice, window: int | None, scale: float) -> Tensor:
    """Scaled scores [H, rows, keys], -inf where a row does not see a key."""
    groups = key.shape[1]
    scores = (_grouped(query.transpose(0, 1), groups) @ key.permute(1, 2, 0)) * scale
    scores = scores.view(query.shape[1], len(query), len(key))
    row = torch.arange(rows.start, rows.stop, device=key.device)[:, None]
    at = torch.arange(keys.start, keys.stop, device=key.device)
    unseen = at > row
    if window is not None:
        unseen |= at <= row - window
    return scores.masked_fill_(unseen, -torch.inf)


def _grouped(of_heads: Tensor, groups: int) -> Tensor:
    """[H, rows, …] as [G, H / G * rows, …]: heads that share keys lie together."""
    return of_heads.reshape(groups, -1, of_heads.shape[-1])


def _ungrouped(of_groups: Tensor, heads: int) -> Tensor:
    """[G, H / G * rows, D] as [rows, H, D]."""
    return of_groups.reshape(heads, -1, of_groups.shape[-1]).transpose(0, 1)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
