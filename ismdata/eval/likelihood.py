"""Negative log-likelihood of the answers in packed shards, overall and by turn.

Every target counts exactly once and with the same weight. Its loss is -ln p(token | the keys its row sees), in nats;
sums are float64. `loss_weight` is not applied: it says how to train, not what to measure. A message of weight 0 has no
targets.

Shape legend: B samples, T = seq_len, N targets, A answers, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ismdata.data import Collator, PackedDataset
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError
from ismdata.eval.answers import Answers
from ismdata.eval.bootstrap import Bootstrap, Estimate, FloatArray, estimate, ratio
from ismdata.masks import IGNORE_INDEX

Name = TypeVar("Name", int, str)

#: Maximum number of logits in memory at a time: 256 MiB in float32.
_CHUNK_LOGITS = 1 << 26


@torch.inference_mode()
def target_losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the loss of each target of a batch.

    Logits are made for a chunk of targets at a time. Where the model changes the logits after its head (a scale, a
    cap), they are made for one sequence at a time instead.

    Args:
        model: An attached model in evaluation mode.
        batch: A batch of the Collator.

    Returns:
        Losses in nats, [N], in the order of the sequences; float32, or the dtype of the logits if that is wider.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in ("labels", "loss_weight")}
    labels = batch["labels"].to(model.device)
    is_target = labels[:, 1:] != IGNORE_INDEX  # row t predicts token t + 1
    target = labels[:, 1:][is_target]
    if not len(target):
        return torch.zeros(0)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # Compare on rows with targets: hidden states of padding may be zeros, which give equal logits under any scale.
    compared = torch.unique(is_target.int().argmax(-1))
    with _hidden_states(model) as states:
        logits = model(**inputs, logits_to_keep=compared).logits
    if head is not None and len(states) == 1 and torch.equal(head(states[0][:, compared]), logits):
        rows = states[0][:, :-1][is_target]  # [N, H]
        size = max(1, _CHUNK_LOGITS // logits.shape[-1])
        parts = [_losses(head(rows[at : at + size]), target[at : at + size]) for at in range(0, len(rows), size)]
    else:
        parts = []
        for sample in range(len(labels)):
            kept = is_target[sample].nonzero().squeeze(-1)
            if len(kept):
                one = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
                logits = model(**one, logits_to_keep=kept).logits[0]
                parts.append(_losses(logits, labels[sample, 1:][kept]))
    return torch.cat(parts)


@contextmanager
def _hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Record the output of the base model, [B, T, H], for each call inside the context."""
    states: list[Tensor] = []
    base: nn.Module = model.base_model
    hook = base.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        hook.remove()


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, target, reduction="none")


def answer_losses(
    model: PreTrainedModel,
    dataset: PackedDataset,
    answers: Answers,
    *,
    mask: str,
    batch_size: int = 4,
    reporter: Reporter = LOGGED,
) -> FloatArray:
    """Sum the losses of the targets in each answer.

    Args:
        model: An attached model in evaluation mode.
        dataset: The packed shards.
        answers: All answers of the shards, from `find_answers`.
        mask: The mask to run the model under. `ism` and `causal` share shards.
        batch_size: Sequences per batch.
        reporter: Receives the progress in sequences.

    Returns:
        The loss of each answer in nats, float64[A].

    Raises:
        UsageError: If the shards cannot be used under the mask.
        DataError: If a loss is not finite, or a target lies outside the answers.
    """
    collator = Collator(mask)
    sums = np.zeros(len(answers), np.float64)
    bounds = np.searchsorted(answers.row, np.arange(len(dataset) + 1))
    for first in range(0, len(dataset), batch_size):
        last = min(first + batch_size, len(dataset))
        losses = target_losses(model, collator([dataset[row] for row in range(first, last)])).double().cpu().numpy()
        mine = slice(bounds[first], bounds[last])
        ends = np.cumsum(answers.targets[mine])
        expected = ends[-1] if len(ends) else 0
        if len(losses) != expected:
            raise DataError(
                f"{dataset.shards.folder}: rows {first} to {last - 1} have {len(losses)} targets, but only {expected} "
                "in answers; expected none outside answers. Run `ismdata verify` on the folder"
            )
        if len(losses):
            sums[mine] = np.add.reduceat(losses, ends - answers.targets[mine])
        if not np.isfinite(sums[mine]).all():
            index = int(np.flatnonzero(~np.isfinite(sums[mine]))[0]) + mine.start
            raise DataError(
                f"{dataset.shards.folder}: row {answers.row[index]}: the loss of turn {answers.turn[index]} of "
                f"{answers.conversation[index]} is {sums[index]}; expected a finite number. The model's weights are "
                "broken, or exceed the range of the precision. Try --precision float32"
            )
        reporter.progress("evaluate", last, len(dataset))
    return sums


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The loss per token over a set of answers; perplexity is its exponential.

    Attributes:
        conversations: Number of conversations that have such an answer.
        answers: Number of answers.
        target_tokens: Number of targets.
        nll: Mean loss in nats per target.
    """

    conversations: int
    answers: int
    target_tokens: int
    nll: Estimate

    def as_json(self) -> dict[str, Any]:
        """The likelihood as eval.json stores it, with the perplexity."""
        interval = self.nll.interval
        perplexity = Estimate(
            value=float(np.exp(self.nll.value)),
            interval=None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1]))),
        )
        return {
            "conversations": self.conversations,
            "answers": self.answers,
            "target_tokens": self.target_tokens,
            "nll": self.nll.as_json(),
            "perplexity": perplexity.as_json(),
        }


def likelihood(answers: Answers, losses: FloatArray, bootstrap: Bootstrap) -> tuple[Likelihood, dict[int, Likelihood]]:
    """Compute the loss per token over all answers and over those of each turn number.

    Args:
        answers: The answers.
        losses: The loss of each answer, float64[A], from `answer_losses`.
        bootstrap: How to resample the conversations for the intervals.

    Returns:
        The likelihood of all answers, and one for each turn number in ascending order.
    """
    group = conversation_numbers(answers.conversation)
    everything = np.ones(len(answers), np.bool_)
    turns = {int(turn): answers.turn == turn for turn in np.unique(answers.turn)}
    overall = _likelihood(answers, losses, group, everything, bootstrap)
    return overall, likelihood_by(answers, losses, turns, bootstrap)


def likelihood_by(
    answers: Answers, losses: FloatArray, groups: Mapping[Name, NDArray[np.bool_]], bootstrap: Bootstrap
) -> dict[Name, Likelihood]:
    """Compute the loss per token over each group of answers; `groups` are bool[A] by name."""
    number = conversation_numbers(answers.conversation)
    return {name: _likelihood(answers, losses, number, chosen, bootstrap) for name, chosen in groups.items()}


def _likelihood(
    answers: Answers, losses: FloatArray, group: NDArray[np.int64], chosen: NDArray[np.bool_], bootstrap: Bootstrap
) -> Likelihood:
    """The likelihood of the answers in `chosen`, bool[A]; conversations without any of them are not resampled."""
    _, owner = np.unique(group[chosen], return_inverse=True)
    sums = group_sums(owner, np.stack([losses[chosen], answers.targets[chosen]], axis=1))
    return Likelihood(
        conversations=len(sums),
        answers=int(chosen.sum()),
        target_tokens=int(answers.targets[chosen].sum()),
        nll=estimate(sums, ratio, bootstrap),
    )


def conversation_numbers(conversation: Sequence[str]) -> NDArray[np.int64]:
    """Number the conversations of answers by the order of their ids, int64[A]; the same in any packing."""
    return np.unique(np.array(conversation, dtype=object), return_inverse=True)[1].astype(np.int64)


def group_sums(group: NDArray[np.int64], values: NDArray[Any]) -> FloatArray:
    """Sum values, [A, S], over each group, float64[G, S]."""
    sums = np.zeros((int(group.max(initial=-1)) + 1, values.shape[1]), np.float64)
    np.add.at(sums, group, values)
    return sums
