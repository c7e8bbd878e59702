"""The loss of a batch whose targets have weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ismdata.errors import UnsupportedModelError
from ismdata.masks import IGNORE_INDEX


def weighted_loss(
    stock_loss: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    loss_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The model's own loss; for a batch with weights, the sum of weight x loss divided by the number of targets.

    The weights do not change the divisor, so a target of weight 2 contributes twice the gradient of one of weight 1.

    Args:
        stock_loss: The model's own loss function, as transformers calls it.
        logits: [B, T, V].
        labels: int64[B, T], unshifted, IGNORE_INDEX where a token is not a target.
        vocab_size: V.
        loss_weight: float32[B, T], aligned with `labels`.
        options: Further keywords of the model's forward, such as `num_items_in_batch`.

    Returns:
        A scalar.

    Raises:
        UnsupportedModelError: if `loss_weight` and `shift_labels` are both given.
    """
    if loss_weight is None:
        return stock_loss(logits=logits, labels=labels, vocab_size=vocab_size, **options)
    if options.get("shift_labels") is not None:
        raise UnsupportedModelError(
            "the batch has loss_weight and shift_labels; weights are aligned with unshifted labels. "
            "Turn sequence parallelism off"
        )
    target = labels[..., 1:].to(logits.device)
    loss = nn.functional.cross_entropy(
        logits[..., :-1, :].float().flatten(0, -2), target.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    total = (loss * loss_weight[..., 1:].to(loss).flatten()).sum()
    return mean_over_targets(total, labels, options.get("num_items_in_batch"))


def mean_over_targets(total: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Divide a sum of losses by the number of targets.

    Args:
        total: The sum, a scalar.
        labels: int64[B, T], unshifted, IGNORE_INDEX where a token is not a target.
        num_items_in_batch: The divisor where the Trainer gives one: the items of all parts of a step.

    Returns:
        A scalar on the device of `total`.
    """
    count = (labels[..., 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
