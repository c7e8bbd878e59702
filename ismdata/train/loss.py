"""The training loss: one mean over the global batch, computed from the hidden states of the targets only.

On the data side, `TrainingCollator` adds the targets' weights to a batch, and the number of items that the loss is a
mean over. The sum of all parts is therefore one mean, however sequences are packed, split into micro-batches and
distributed over processes. On the model side, `compute_loss_at_targets` keeps the output head from computing logits at
every token: the loss applies the head to the hidden states that predict targets, in chunks (`chunked_loss.py`).

Shape legend: B samples, T = seq_len, N targets, H width of the model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ismdata.attention import mean_over_targets, takes_two_positions
from ismdata.choices import LossWeighting, check_choice
from ismdata.data import PackedSequence
from ismdata.masks import ANSWER, BLOCK_SIZE, END, IGNORE_INDEX, KIND, START
from ismdata.train.chunked_loss import target_loss

#: Entries of a training batch that are counts, int64[] each. `take_counts` removes them before the model is called.
LOSS_ITEMS = "loss_items"  # what the loss is a mean over
TOKENS = "document_tokens"
TARGETS = "target_tokens"
PAIRS = "visible_pairs"  # pairs of a row and a key that it sees
COUNTS = (LOSS_ITEMS, TOKENS, TARGETS, PAIRS)


def target_weights(sequence: PackedSequence, weighting: str) -> tuple[NDArray[np.float32] | None, int]:
    """The weight of each token's loss, and the sequence's items.

    The loss of a batch is the sum of weight x loss over its targets, divided by the sum of the items.

    - `token`: each target counts the same. Items are targets.
    - `answer`: each answer with targets counts the same; its targets share one item.
    - `conversation`: each document with targets counts the same; its targets share one item.

    A message's own weight multiplies the loss of its targets; it does not change the items.

    Args:
        sequence: A packed row of T tokens.
        weighting: One of the three above.

    Returns:
        The weights, float32[T], None if all are 1; and the number of items.

    Raises:
        UsageError: for another weighting.
    """
    check_choice("--loss-weighting", weighting, LossWeighting)
    own = sequence.loss_weight
    if weighting == "token":
        return own, int(sequence.loss_mask.sum())
    if weighting == "answer":
        spans = sequence.spans[sequence.spans[:, KIND] == ANSWER]
        starts, ends = spans[:, START], spans[:, END]
    else:
        ends = np.cumsum(sequence.seq_lens)
        starts = ends - sequence.seq_lens
    before = np.concatenate([[0], np.cumsum(sequence.loss_mask, dtype=np.int64)])
    targets = before[ends] - before[starts]
    has_targets = targets > 0
    weights = np.zeros(len(sequence.loss_mask), np.float32)
    share = np.repeat(1 / targets[has_targets], (ends - starts)[has_targets]).astype(np.float32)
    edges = np.zeros(len(weights) + 1, np.int64)
    edges[starts[has_targets]] += 1
    edges[ends[has_targets]] -= 1
    weights[np.cumsum(edges[:-1]) > 0] = share
    return weights if own is None else weights * own, int(has_targets.sum())


def take_counts(batch: dict[str, Tensor]) -> Tensor:
    """Remove the COUNTS from a batch and return them, int64[4] in that order."""
    return torch.stack([batch.pop(name) for name in COUNTS])


class _HeadAtTargets:
    """Replaces a model's output head and loss function while the model is called with labels.

    The head then returns the hidden states unchanged, and the loss function applies the head's weights to those that
    predict targets. All of it runs inside the model's forward, as DDP and FSDP require.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear) -> None:
        self.head = head
        self.correct: Tensor | None = None  # of the last call
        self.called_with_labels = False
        head.forward = self.forward  # type: ignore[method-assign, assignment]
        model.loss_function = self.loss
        self.hooks = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called_with_labels = kwargs.get("labels") is not None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.called_with_labels and output is not None:
            output["logits"] = None  # these are hidden states, which no caller must mistake for logits
        self.called_with_labels = False
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self.called_with_labels else nn.functional.linear(hidden, self.head.weight, self.head.bias)

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        """As `weighted_loss`, for hidden states in place of logits."""
        found = target_loss(logits, self.head.weight, self.head.bias, labels, options.get("loss_weight"))
        self.correct = found.correct
        return mean_over_targets(found.total, labels, options.get("num_items_in_batch"))

    def remove(self, model: PreTrainedModel, stock_loss: Any) -> None:
        del self.head.forward
        model.loss_function = stock_loss
        for hook in self.hooks:
            hook.remove()


def compute_loss_at_targets(model: PreTrainedModel) -> bool:
    """Make an attached model compute its loss from the hidden states of the targets only, in place.

    Called with labels, the model then returns the same `loss` and no `logits`; without labels it returns logits as
    before. A model that computes something between head and loss (capped or scaled logits) or has a head of another
    kind would return another loss. A short sequence is tried, and such a model is left unchanged.

    Args:
        model: A causal language model that `attach` changed.

    Returns:
        Whether the model was changed.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or not _returns_logits_of_head(model, head):
        return False
    stock_loss = model.loss_function
    expected = _loss_of_a_few_tokens(model)
    replaced = _HeadAtTargets(model, head)
    found = _loss_of_a_few_tokens(model)
    if not abs(found - expected) <= 1e-3 * abs(expected):
        replaced.remove(model, stock_loss)
        return False
    return True


def count_correct(model: PreTrainedModel, logits: Tensor | None, labels: Tensor) -> Tensor:
    """Count the targets that the model's last call predicted: those whose token has the largest logit.

    Args:
        model: The model that was called with labels.
        logits: Its logits [B, T, V]; None from a model that `compute_loss_at_targets` changed.
        labels: int64[B, T], unshifted, IGNORE_INDEX where a token is not a target.

    Returns:
        The count, int64[].
    """
    if logits is None:
        at_targets = cast(_HeadAtTargets, model.loss_function.__self__)
        return cast(Tensor, at_targets.correct)
    shifted = labels[:, 1:]
    correct = labels.new_zeros(())
    for row, target in zip(logits, shifted, strict=True):  # one sample at a time: argmax copies its input
        correct += ((row[:-1].argmax(-1) == target) & (target != IGNORE_INDEX)).sum()
    return correct


def _returns_logits_of_head(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether a model returns what its head computes, also where logits are far larger than today's.

    Capped or scaled logits near zero, as those of a new model, give nearly the loss of plain ones.
    """
    replaced: list[Tensor] = []

    def large(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        values = torch.linspace(-100, 100, output.numel(), device=output.device)
        replaced.append(values.view_as(output).to(output))
        return replaced[-1]

    hook = head.register_forward_hook(large)
    try:
        logits = _run_a_few_tokens(model, labels=False).logits
    finally:
        hook.remove()
    return len(replaced) == 1 and logits.shape == replaced[0].shape and torch.equal(logits.to(replaced[0]), replaced[0])


def _loss_of_a_few_tokens(model: PreTrainedModel) -> float:
    """The attached model's mean loss under the causal mask over BLOCK_SIZE tokens spread over the vocabulary."""
    return float(_run_a_few_tokens(model, labels=True).loss)


def _run_a_few_tokens(model: PreTrainedModel, *, labels: bool) -> Any:
    """The attached model's output for the tokens of `_loss_of_a_few_tokens`."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    length = BLOCK_SIZE  # a length that every backend accepts
    tokens = (torch.arange(1, length + 1, device=model.device) * max(1, vocabulary // (length + 2))) % vocabulary
    row = torch.arange(length, dtype=torch.int32, device=model.device)[None]
    batch = {"input_ids": tokens[None], "doc_start": torch.zeros_like(row), "kv_end": row + 1}
    if labels:
        batch["labels"] = tokens[None]
    if takes_two_positions(model):
        batch |= {"position_ids": row + 1, "position_ids_2": torch.zeros_like(row)}
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            return model(**batch)
    finally:
        model.train(training)
