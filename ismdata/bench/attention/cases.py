"""The cases of `ismdata bench attention`: a backend, or plain causal attention, on a batch of random inputs.

Shape legend: B rows, T = seq_len, H heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ismdata.attention import BACKENDS, Intervals
from ismdata.bench.attention import yardstick
from ismdata.bench.attention.workload import Workload
from ismdata.masks import block_table, varlen_tables

#: The name of plain causal attention, beside the names of the backends.
YARDSTICK = "yardstick"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The number of query heads and key heads of an attention layer, and the width of each."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch in a layer's memory order.

    Attributes:
        query: [B, T, H, D], a leaf that requires a gradient; so are `key` and `value`.
        key: [B, T, G, D].
        value: [B, T, G, D].
        grad: The gradient of the output, [B, T, H, D].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value."""
        return self.query, self.key, self.value

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """A copy on another device or in another precision, with its own leaves."""
        query, key, value = (each.detach().to(device, dtype).requires_grad_() for each in self.leaves)
        return Inputs(query=query, key=key, value=value, grad=self.grad.to(device, dtype))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A backend on one batch.

    Attributes:
        pairs: Visible pairs of query and key.
        inputs: Queries, keys and values.
        prepare: Makes what a micro-batch needs once.
        forward: Computes the output [B, T, H, D] with it.
        forward_only: Why there is no backward pass; None if there is one.
    """

    pairs: int
    inputs: Inputs
    prepare: Callable[[], Any]
    forward: Callable[[Any], Tensor]
    forward_only: str | None = None

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients of query, key and value."""
        return torch.autograd.grad(output, self.inputs.leaves, self.inputs.grad)

    def once(self) -> tuple[Tensor, ...]:
        """Prepare, then run as the first layer does: the output and, if there is a backward pass, the gradients."""
        output = self.forward(self.prepare())
        return (output.detach(), *(self.backward(output) if self.forward_only is None else ()))


class Layer(nn.Module):
    """The attributes that backends read from a model's attention layer."""

    is_causal = True

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_key_value_groups = heads // kv_heads


def random_inputs(workload: Workload, heads: Heads, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Standard normal inputs. The same arguments give the same values on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    query, key, value, grad = (
        torch.randn(
            (workload.rows, workload.seq_len, count, heads.width), generator=generator, device=device, dtype=dtype
        )
        for count in (heads.heads, heads.kv_heads, heads.kv_heads, heads.heads)
    )
    return Inputs(query=query.requires_grad_(), key=key.requires_grad_(), value=value.requires_grad_(), grad=grad)


def batch_intervals(workload: Workload, mask: str, device: torch.device) -> Intervals:
    """The intervals of the batch on the device, with the tables from shards and Collator."""
    doc_start, kv_end = workload.intervals(mask)
    arrays = {"doc_start": doc_start, "kv_end": kv_end, "block_table": block_table(doc_start, kv_end)}
    arrays |= varlen_tables.tables(doc_start, kv_end).as_batch()
    tables = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return Intervals(
        doc_start=tables.pop("doc_start"),
        kv_end=tables.pop("kv_end"),
        block_table=tables.pop("block_table"),
        keys=workload.seq_len,
        tables=tables,
    )


def missing(name: str, device: torch.device) -> str | None:
    """Why a backend, or the yardstick, cannot run on this device; None if it can."""
    return yardstick.missing(device) if name == YARDSTICK else BACKENDS[name].missing(device)


def case(name: str, mask: str, workload: Workload, inputs: Inputs) -> Case:
    """A backend, or the yardstick (causal whatever `mask` is), on these inputs."""
    return _yardstick(workload, inputs) if name == YARDSTICK else _backend(name, mask, workload, inputs)


def _backend(name: str, mask: str, workload: Workload, inputs: Inputs) -> Case:
    """Call the backend as transformers does from a layer, where queries are a transposed view."""
    device = inputs.query.device
    backend = BACKENDS[name]
    intervals = batch_intervals(workload, mask, device)
    layer = Layer(inputs.query.shape[2], inputs.key.shape[2])
    scaling = 1 / math.sqrt(inputs.query.shape[-1])

    def forward(prepared: Any) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in inputs.leaves)
        options = {"scaling": scaling, "dropout": 0.0, "sliding_window": None}
        return backend.attention(layer, query, key, value, None, interval_mask=prepared, **options)[0]

    return Case(
        pairs=workload.visible_pairs(mask),
        inputs=inputs,
        prepare=lambda: backend.prepare(intervals),
        forward=forward,
        forward_only=backend.missing_for_training(device),
    )


def _yardstick(workload: Workload, inputs: Inputs) -> Case:
    """The yardstick on the documents of all rows, end to end."""
    seq_lens = workload.pieces()

    def forward(attention: yardstick.Attention) -> Tensor:
        query, key, value = (each.flatten(0, 1) for each in inputs.leaves)
        return attention(query, key, value).view(inputs.query.shape)

    return Case(
        pairs=workload.visible_pairs("causal"),
        inputs=inputs,
        prepare=lambda: yardstick.causal_attention(seq_lens, inputs.query.device),
        forward=forward,
    )
