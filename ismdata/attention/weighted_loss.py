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
    num_items_in_batch: Tensor | int | None = None,
    loss_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The model's own loss or, where the batch has weights, the sum of weight x loss over the number of targets.

    The divisor is `num_items_in_batch` where the Trainer gives it, else the targets of this batch; weights do not enter
    it, so a target of weight 2 pulls twice as hard as it would alone.
    """
    if loss_weight is None:
        return stock_loss(
            logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **options
        )
    if options.get("shift_labels") is not None:
        raise UnsupportedModelError(
            "loss_weight and shift_labels came together; weights are aligned with unshifted labels. "
            "Turn sequence parallelism off"
        )
    target = labels[..., 1:].to(logits.device)
    loss = nn.functional.cross_entropy(
        logits[..., :-1, :].float().flatten(0, -2), target.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    total = (loss * loss_weight[..., 1:].to(loss).flatten()).sum()
    count = (target != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
