"""How likely a model finds the answers of packed shards: negative log-likelihood and perplexity, also by turn.

Every target of the shards counts exactly once, and the same: its loss is -ln p(token | what the mask lets its row see),
in nats, and sums over tokens are float64. Message weights say how a model is to be trained, not what it is to be
measured by, so they are left out here; a message of weight 0 has no targets at all.

Shape legend: B samples, T = seq_len, N targets, A answers, H width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ismdata.data import Collator, PackedDataset, check_serves
from ismdata.errors import DataError
from ismdata.eval.answers import Answers
from ismdata.eval.bootstrap import Bootstrap, Estimate, FloatArray, estimate, ratio
from ismdata.masks import IGNORE_INDEX

#: The most logits made at once: a quarter of a GiB in float32.
_CHUNK_LOGITS = 1 << 26

Progress = Callable[[int, int], None]


@torch.inference_mode()
def target_losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of each target of a batch in nats, [N], sequence by sequence; float32, or as the logits if wider.

    model: attached and in evaluation mode. batch: the Collator's. Logits exist for some targets at a time, unless the
    model does something of its own between head and logits: then for a sequence at a time.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in ("labels", "loss_weight")}
    labels = batch["labels"].to(model.device)
    is_target = labels[:, 1:] != IGNORE_INDEX  # row t predicts token t + 1
    target = labels[:, 1:][is_target]
    if not len(target):
        return torch.zeros(0)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # A row of each sequence that has targets: padding may come out as zeros, which every head makes the same of.
    tried = torch.unique(is_target.int().argmax(-1))
    with _hidden_states(model) as seen:
        logits = model(**inputs, logits_to_keep=tried).logits
    if head is not None and len(seen) == 1 and torch.equal(head(seen[0][:, tried]), logits):
        rows = seen[0][:, :-1][is_target]  # [N, H]
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
    """What the model below the head gives while it is called, [B, T, H] each time."""
    seen: list[Tensor] = []
    below: nn.Module = model.base_model
    hook = below.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        yield seen
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
    progress: Progress = lambda done, total: None,
) -> FloatArray:
    """The summed loss of each answer in nats, float64[A].

    answers: those of the dataset (`find_answers`). mask: what the model is run under; ism and causal share shards.
    batch_size: sequences at a time. progress: called with sequences done and their total.

    Raises UsageError where the shards cannot serve the mask, DataError where a loss is no number.
    """
    check_serves(mask, packed_mask=dataset.mask)
    collator = Collator(mask)
    sums = np.zeros(len(answers), np.float64)
    bounds = np.searchsorted(answers.row, np.arange(len(dataset) + 1))
    for first in range(0, len(dataset), batch_size):
        last = min(first + batch_size, len(dataset))
        losses = target_losses(model, collator([dataset[row] for row in range(first, last)])).double().cpu().numpy()
        mine = slice(bounds[first], bounds[last])
        ends = np.cumsum(answers.targets[mine])
        if len(losses) != (ends[-1] if len(ends) else 0):
            raise DataError(
                f"{dataset.shards.folder}: rows {first} to {last - 1} have {len(losses)} targets, "
                f"{ends[-1] if len(ends) else 0} of them in answers; expected all. Run `ismdata verify` on it"
            )
        if len(losses):
            sums[mine] = np.add.reduceat(losses, ends - answers.targets[mine])
        if not np.isfinite(sums[mine]).all():
            at = int(np.flatnonzero(~np.isfinite(sums[mine]))[0]) + mine.start
            raise DataError(
                f"{dataset.shards.folder}: row {answers.row[at]}: the loss of turn {answers.turn[at]} of "
                f"{answers.conversation[at]} is {sums[at]}; expected a finite number. The model's weights are broken, "
                "or too large for the precision: try --precision float32"
            )
        progress(last, len(dataset))
    return sums


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Loss per token over some answers. Perplexity is its exponential."""

    conversations: int
    answers: int
    target_tokens: int
    nll: Estimate

    def as_json(self) -> dict[str, Any]:
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
    """Loss per token over all answers, and over those of each turn number; intervals by drawing conversations.

    losses: float64[A], as `answer_losses` gives them.
    """
    group = conversation_numbers(answers.conversation)
    everything = np.ones(len(answers), np.bool_)
    turns = {int(turn): answers.turn == turn for turn in np.unique(answers.turn)}
    overall = _likelihood(answers, losses, group, everything, bootstrap)
    return overall, {
        turn: _likelihood(answers, losses, group, chosen, bootstrap) for turn, chosen in sorted(turns.items())
    }


def _likelihood(
    answers: Answers, losses: FloatArray, group: NDArray[np.int64], chosen: NDArray[np.bool_], bootstrap: Bootstrap
) -> Likelihood:
    """Over the chosen answers, of the conversations that have any: bool[A]."""
    _, owner = np.unique(group[chosen], return_inverse=True)
    sums = group_sums(owner, np.stack([losses[chosen], answers.targets[chosen]], axis=1))
    return Likelihood(
        conversations=len(sums),
        answers=int(chosen.sum()),
        target_tokens=int(answers.targets[chosen].sum()),
        nll=estimate(sums, ratio, bootstrap),
    )


def conversation_numbers(conversation: Sequence[str]) -> NDArray[np.int64]:
    """Which conversation each answer is of, by number, int64[A]: the order of their ids, so the same in any packing."""
    return np.unique(np.array(conversation, dtype=object), return_inverse=True)[1].astype(np.int64)


def group_sums(group: NDArray[np.int64], values: NDArray[Any]) -> FloatArray:
    """Sums over each group, float64[G, S], of values, [A, S]."""
    sums = np.zeros((int(group.max(initial=-1)) + 1, values.shape[1]), np.float64)
    np.add.at(sums, group, values)
    return sums
