"""The yardstick of attention: plain causal FlashAttention over documents of different lengths.

On CUDA this is `torch.nn.attention.varlen.varlen_attn`; on a CPU, torch's causal attention, document by document.
Shape legend: N = B x T tokens end to end, H heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def missing(device: torch.device) -> str | None:
    """Why the yardstick cannot run on this device; None if it can."""
    if device.type == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; expected torch 2.10 or newer"
    return None


def name(device: torch.device) -> str:
    """The yardstick on this device, in words."""
    if device.type == "cuda":
        return "torch varlen_attn, causal over documents"
    return "torch attention, is_causal, document by document"


def causal_attention(seq_lens: list[int], device: torch.device) -> Attention:
    """Causal attention over documents of these lengths: (query [N, H, D], key [N, G, D], value [N, G, D]) -> [N, H, D].

    Tables are made once, in this call.
    """
    return _varlen(seq_lens, device) if device.type == "cuda" else _by_document(seq_lens)


def _varlen(seq_lens: list[int], device: torch.device) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor(list(accumulate(seq_lens, initial=0)), dtype=torch.int32, device=device)
    longest = max(seq_lens)
    known = inspect.signature(varlen_attn).parameters  # renamed between torch 2.10 and 2.11
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
        assert isinstance(output, Tensor)  # a pair only if the log-sum-exp is requested
        return output

    return attention


def _by_document(seq_lens: list[int]) -> Attention:
    documents = [slice(start, end) for start, end in pairwise(accumulate(seq_lens, initial=0))]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        for document in documents:
            heads_first = [each[None, document].transpose(1, 2) for each in (query, key, value)]
            output = scaled_dot_product_attention(
                heads_first[0], heads_first[1], heads_first[2], is_causal=True, enable_gqa=True
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    return attention
