"""The cross-entropy of the targets from their hidden states, without the logits of all of them.

Logits exist for one chunk of targets at a time. The forward pass computes a chunk's gradients while its logits are
there, so that nothing is recomputed, and the backward pass only multiplies them. This costs the operations of a loss
over all logits; docs/training.md has the measurements against torch's `linear_cross_entropy`, whose chunks of few rows
read the whole head for each.

Shape legend: B samples, T = seq_len, N targets, H width of the model, V vocabulary, C targets in a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ismdata.masks import IGNORE_INDEX

#: The most logits of a chunk: a quarter of a GiB in float32.
_CHUNK_LOGITS = 1 << 26


class TargetLoss(NamedTuple):
    """The loss of some targets, and how many of them the model predicts."""

    total: Tensor  # the sum of weight x cross-entropy: a scalar in float32 or wider
    correct: Tensor  # int64[]: the targets whose token has the largest logit


def target_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_weight: Tensor | None = None,
) -> TargetLoss:
    """Compute the loss of the targets from hidden states.

    Gradients reach `hidden`, `weight` and `bias`, once: a second backward pass through the same graph is an error.

    Args:
        hidden: Hidden states [B, T, H]; row t predicts token t + 1.
        weight: The output head's weight [V, H].
        bias: The output head's bias [V].
        labels: int64[B, T], unshifted, IGNORE_INDEX where a token is not a target.
        loss_weight: float32[B, T], aligned with `labels`.

    Returns:
        The loss and the count of correct predictions.
    """
    shifted = labels[:, 1:].flatten()
    chosen = (shifted != IGNORE_INDEX).nonzero().squeeze(-1)
    rows = hidden[:, :-1].flatten(0, 1)[chosen]  # [N, H]
    weights = None if loss_weight is None else loss_weight[:, 1:].flatten()[chosen]
    autocast = torch.is_autocast_enabled(rows.device.type)
    dtype = torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype
    total, correct = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, shifted[chosen], weights, dtype, torch.is_grad_enabled()
    )
    return TargetLoss(total, correct)


class _ChunkedLoss(torch.autograd.Function):
    """The loss as a function of rows [N, H], weight [V, H] and bias [V]; matrix products are in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weights: Tensor | None,
        dtype: torch.dtype,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        of_rows, of_weight, of_bias = (differentiate and needed for needed in ctx.needs_input_grad[:3])
        # Sums over chunks are float32 or wider.
        rows_grad = torch.empty_like(rows) if of_rows else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if bias is not None and of_bias else None
        total, correct = rows.new_zeros((), dtype=wide), target.new_zeros(())
        size = max(1, _CHUNK_LOGITS // len(weight))
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            inputs, expected = rows[part].to(dtype), target[part]
            logits = nn.functional.linear(inputs, head, offset).to(wide)  # [C, V]
            correct += (logits.argmax(-1) == expected).sum()
            log_probabilities = logits.log_softmax(-1)
            del logits
            places = torch.arange(len(expected), device=expected.device)
            losses = -log_probabilities[places, expected]
            total += (losses if weights is None else losses * weights[part].to(wide)).sum()
            if not (of_rows or of_weight or of_bias):
                continue
            logits_grad = log_probabilities.exp_()
            logits_grad[places, expected] -= 1
            if weights is not None:
                logits_grad *= weights[part, None].to(wide)
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)
            logits_grad = logits_grad.to(dtype)
            if rows_grad is not None:
                rows_grad[part] = logits_grad @ head
            if weight_grad is not None and dtype == wide:
                weight_grad.addmm_(logits_grad.T, inputs)
            elif weight_grad is not None:
                weight_grad += logits_grad.T @ inputs
        ctx.gradients = (rows_grad, weight_grad, bias_grad)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through the same loss; its gradients are kept for one")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if each is None else each.mul_(total_grad) for each in gradients), None, None, None, None
