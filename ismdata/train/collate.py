"""The batches of a training run: the Collator's, with weights and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ismdata.data import Collator, Sample
from ismdata.train.loss import LOSS_ITEMS, PAIRS, TARGETS, TOKENS, target_weights


@dataclass(frozen=True)
class TrainingCollator:
    """The Collator of `ismdata train`: adds the COUNTS to a batch, and `loss_weight` where targets differ in weight.

    Args:
        mask: As for the Collator.
        weighting: As for `target_weights`.
        tables: As for the Collator.
    """

    mask: str | None = None
    weighting: str = "token"
    tables: bool = False

    def __post_init__(self) -> None:
        Collator(self.mask)  # refuses an unknown mask

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        batch = Collator(self.mask, tables=self.tables)(samples)
        weighted = [target_weights(sample.sequence, self.weighting) for sample in samples]
        weights = [weight for weight, _ in weighted if weight is not None]
        if weights:
            batch["loss_weight"] = torch.from_numpy(np.stack(weights))
        tokens = sum(int(sample.sequence.seq_lens.sum()) for sample in samples)
        padding = batch["labels"].numel() - tokens
        counts = {
            LOSS_ITEMS: sum(items for _, items in weighted),
            TOKENS: tokens,
            TARGETS: sum(int(sample.sequence.loss_mask.sum()) for sample in samples),
            PAIRS: int((batch["kv_end"] - batch["doc_start"]).sum()) - padding,  # a padding row sees itself
        }
        return batch | {name: torch.tensor(count) for name, count in counts.items()}
