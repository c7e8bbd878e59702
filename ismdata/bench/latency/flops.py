"""Floating-point operations of a prefill: by formula from the model's config, and counted while it runs.

A multiplication and its addition are two operations. Norms, rotary positions, the softmax and the embedding's look-up
are in neither count.

Shape legend: n new tokens, k keys they see (those in the cache and the new ones), h hidden size, f size inside the MLP,
H heads, G heads of keys and values, D width of a head, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ismdata.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a decoder decides its operations. mlp_matrices: 3 for a gated MLP, 2 for a plain one."""

    layers: int
    hidden: int
    mlp: int
    mlp_matrices: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer: 2·h·H·D (queries, output) + 2·h·G·D (keys, values) + 3·h·f (gated)."""
        projections = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_width
        return projections + self.mlp_matrices * self.hidden * self.mlp


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a dense decoder. Raises UnsupportedModelError for one whose matrices are not what its config says.

    Matrices of the layers are all linear modules but the head; that they are what the formula counts is checked.
    """
    config: Any = model.config.get_text_config()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )
    heads = getattr(config, "num_attention_heads", 0)
    found = {
        "layers": getattr(config, "num_hidden_layers", 0),
        "hidden": getattr(config, "hidden_size", 0),
        "mlp": getattr(config, "intermediate_size", 0),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocabulary": getattr(config, "vocab_size", 0),
    }
    if all(found.values()):
        width = getattr(config, "head_dim", None) or found["hidden"] // heads
        for matrices in (3, 2):
            shape = Shape(**found, head_width=width, mlp_matrices=matrices)
            if shape.layers * shape.layer_weights == weights:
                return shape
    raise UnsupportedModelError(
        f"{type(model).__name__}: its layers have {weights:,} weights in matrices, which is not what its config "
        "says of attention and one MLP, gated or not; expected a dense decoder such as Llama. Measure another model"
    )


def prefill_flops(shape: Shape, *, new: int, keys: int) -> int:
    """Operations of a prefill that asks for the last token's logits: L·(2·n·weights of a layer + 4·n·k·H·D) + 2·h·V.

    Attention is counted over all n·k pairs under every mask, as dense kernels compute it.
    """
    attention = 4 * new * keys * shape.heads * shape.head_width
    return shape.layers * (2 * new * shape.layer_weights + attention) + 2 * shape.hidden * shape.vocabulary


def textbook_flops(shape: Shape, *, new: int, keys: int) -> int:
    """The same by the paper's appendix A.1, its feed-forward term put right: L·(4·h·k·n + 24·h²·n).

    That is for heads of keys as many as heads, a plain MLP of 4·h, and no head. In print the feed-forward term has s²
    where h²·s belongs: two matrices of 4·h² make 16·h² of the 24.
    """
    return shape.layers * (4 * shape.hidden * keys * new + 24 * shape.hidden**2 * new)


def _attention_on_cpu(query: Any, key: Any, value: Any, *options: Any, out_shape: Any = None, **named: Any) -> int:
    """Operations by the shapes [B, H, n, D], [B, H, k, D] and [B, H, k, D of values]."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[-2] * (width + value[-1]))


#: What torch's counter leaves out: the kernel of scaled dot product attention that CPUs run, mask or not.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def counted_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products and attention kernels that run in `work`, counted at each call.

    Kernels of attention count as dense: what a mask hides is computed by them.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        work()
    return int(counter.get_total_flops())
