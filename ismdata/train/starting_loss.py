"""The loss before the first step, under the causal mask and under the run's own.

Pretrained models know the causal mask. Under another one they are worse at first, and must adapt: docs/adaptation.md.
"""

from __future__ import annotations

import math

import torch
from torch.utils.data import Dataset

from ismdata.choices import Preset, words
from ismdata.data import Sample, check_serves
from ismdata.display import Reporter
from ismdata.errors import IsmdataError
from ismdata.train.collate import TrainingCollator
from ismdata.train.loss import COUNTS, TARGETS, take_counts
from ismdata.train.trainer import PackedTrainer

#: The loss by which a mask may be worse than causal before the user is told what that means, in nats per target.
_WORSE = 0.1


def report_starting_loss(
    trainer: PackedTrainer,
    dataset: Dataset[Sample],
    *,
    model: str,
    mask: str,
    packed_mask: str,
    tables: bool,
    reporter: Reporter,
) -> dict[str, float]:
    """Measure and report the loss of a pretrained model on one micro-batch, which costs less than a step.

    A preset has random weights, which are equally bad under each mask; nothing is measured then.

    Args:
        trainer: The trainer, before its first step.
        dataset: The sequences to measure on; the first micro-batch of them is used.
        model: What the user named: a preset, a folder, a GGUF file or a hub name.
        mask: The run's mask.
        packed_mask: The mask that the sequences were packed for. Those for `prefix` cannot be read as causal ones.
        tables: As for the Collator.
        reporter: Receives the notes.

    Returns:
        The mean loss per target in nats, by mask; empty for a preset.
    """
    if model in words(Preset) or trainer.is_fsdp_enabled:
        return {}
    samples = [dataset[at] for at in range(min(trainer.args.per_device_train_batch_size, len(dataset)))]  # type: ignore[arg-type]
    masks = dict.fromkeys(("causal", mask) if _can_be_causal(packed_mask) else (mask,))
    losses = {name: _mean_loss(trainer, samples, TrainingCollator(name, tables=tables)) for name in masks}
    shown = " · ".join(f"{name} {loss:.3f}, perplexity {math.exp(min(loss, 99)):,.1f}" for name, loss in losses.items())
    reporter.note(f"loss before training: {shown}")
    if losses[mask] - losses.get("causal", losses[mask]) > _WORSE:
        reporter.note(
            f"The model does not know the mask {mask} yet: its answers get better than this only after it has adapted "
            "(docs/adaptation.md says how long that takes). --mask causal needs no adaptation."
        )
    return losses


def _can_be_causal(packed_mask: str) -> bool:
    try:
        check_serves("causal", packed_mask=packed_mask, place="")
    except IsmdataError:
        return False
    return True


def _mean_loss(trainer: PackedTrainer, samples: list[Sample], collator: TrainingCollator) -> float:
    """The mean loss per target of one batch, each target counting the same."""
    network = trainer.model
    assert isinstance(network, torch.nn.Module)
    batch = collator(samples)
    targets = take_counts(batch)[COUNTS.index(TARGETS)]
    batch.pop("loss_weight", None)
    inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    training = network.training
    network.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            loss = network(**inputs, num_items_in_batch=targets.clamp(min=1).to(trainer.args.device))["loss"]
    finally:
        network.train(training)
    return float(loss)
