"""Floating-point operations of a prefill: by a formula from the model's config, and counted while it runs.

A multiplication and an addition are two operations. Neither count includes norms, rotary positions, the softmax and the
embedding.

Shape legend: n new tokens, k keys they see (cached and new), h hidden size, f inner size of the MLP, H heads, G heads
of keys and values, D width of a head, L layers, V vocabulary.
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
    """The sizes of a decoder that decide its operations. `mlp_matrices` is 3 for a gated MLP, 2 for a plain one."""

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
    """Read the shape of a dense decoder from its config, and check it against the model's matrices.

    Raises:
        UnsupportedModelError: If the layers have other matrices than the config says.
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
        f"{type(model).__name__}: its layers have {weights:,} weights in matrices, other than its config says for "
        "attention and one MLP; expected a dense decoder such as Llama. Measure another model"
    )


def prefill_flops(shape: Shape, *, new: int, keys: int) -> int:
    """Operations of a prefill with logits for the last token: L·(2·n·(weights per layer) + 4·n·k·H·D) + 2·h·V.

    Attention counts all n·k pairs under every mask, as dense kernels compute them.
    """
    attention = 4 * new * keys * shape.heads * shape.head_width
    return shape.layers * (2 * new * shape.layer_weights + attention) + 2 * shape.hidden * shape.vocabulary


def textbook_flops(shape: Shape, *, new: int, keys: int) -> int:
    """The same by appendix A.1 of the ISM paper, with its feed-forward term corrected: L·(4·h·k·n + 24·h²·n).

    It assumes as many key heads as heads, a plain MLP of 4·h, and no output head. The printed term has s² instead of
    h²·s: two matrices of 4·h² are 16·h² of the 24.
    """
    return shape.layers * (4 * shape.hidden * keys * new + 24 * shape.hidden**2 * new)


def _attention_on_cpu(query: Any, key: Any, value: Any, *options: Any, out_shape: Any = None, **named: Any) -> int:
    """Operations for shapes [B, H, n, D], [B, H, k, D] and [B, H, k, width of values]."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[-2] * (width + value[-1]))


#: Torch's counter lacks the kernel of scaled dot product attention for CPUs.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def counted_flops(work: Callable[[], object]) -> int:
    """Count the operations of all matrix products and attention kernels in `work`.

    Attention kernels count as dense: they compute hidden pairs too.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        work()
    return int(counter.get_total_flops())
