"""The training loss: a mean over the whole global batch, computed where the targets are and nowhere else.

Two halves. On the side of the data, `TrainingCollator` gives each batch the weights of its targets and the number of
items that the loss is a mean over, so that however sequences are packed, cut into micro-batches and spread over
processes, the sum of all parts is one mean. On the side of the model, `compute_loss_at_targets` keeps the output head
from making logits: the loss takes the hidden states of the rows that predict targets through the head in chunks.

Shape legend: B samples, T = seq_len, N targets, H width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ismdata.attention import takes_two_positions
from ismdata.choices import LossWeighting, check_choice
from ismdata.data import Collator, PackedSequence, Sample
from ismdata.masks import ANSWER, BLOCK_SIZE, IGNORE_INDEX

#: Numbers that travel with a batch: items of the loss, tokens of documents, targets, and pairs of a row and a key that
#: it sees. int64[4].
COUNTS = "counts"

#: The most logits made at once, where the loss is chunked here: a quarter of a GiB in float32.
_CHUNK_LOGITS = 1 << 26


def target_weights(sequence: PackedSequence, weighting: str) -> tuple[NDArray[np.float32] | None, int]:
    """What each token's loss is multiplied by, float32[T], and how many items the sequence has.

    The loss of a batch is the sum of weight x loss over its targets, divided by the sum of the items.

    - `token`: each target counts the same. No weights; the items are targets.
    - `answer`: each answer with targets counts the same; its targets share one item.
    - `conversation`: each document with targets counts the same; its targets share one item.

    A message's own weight multiplies the loss of its targets and does not enter the number of items.
    """
    check_choice("--loss-weighting", weighting, LossWeighting)
    own = sequence.loss_weight
    if weighting == "token":
        return own, int(sequence.loss_mask.sum())
    if weighting == "answer":
        spans = sequence.spans[sequence.spans[:, 2] == ANSWER]
        starts, ends = spans[:, 0], spans[:, 1]
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


@dataclass(frozen=True)
class TrainingCollator:
    """The Collator for `ismdata train`: adds COUNTS to a batch, and `loss_weight` where the weighting asks for it.

    mask, tables: as for the Collator. weighting: as for `target_weights`.
    """

    mask: str | None = None
    weighting: str = "token"
    tables: bool = False

    def __post_init__(self) -> None:
        Collator(self.mask)  # which refuses an unknown mask

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        batch = Collator(self.mask, tables=self.tables)(samples)
        weighed = [target_weights(sample.sequence, self.weighting) for sample in samples]
        weights = [weight for weight, _ in weighed if weight is not None]
        if weights:
            batch["loss_weight"] = torch.from_numpy(np.stack(weights))
        tokens = sum(int(sample.sequence.seq_lens.sum()) for sample in samples)
        targets = sum(int(sample.sequence.loss_mask.sum()) for sample in samples)
        pairs = int((batch["kv_end"] - batch["doc_start"]).sum()) - (
            batch["labels"].numel() - tokens
        )  # padding: one each
        batch[COUNTS] = torch.tensor([sum(items for _, items in weighed), tokens, targets, pairs])
        return batch


def target_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_weight: Tensor | None = None,
) -> Tensor:
    """The sum of weight x cross-entropy over the targets, a scalar in float32 or better.

    hidden: [B, T, H], of which row t predicts token t + 1. weight: [V, H] and bias: [V], of the output head. labels:
    int64[B, T], unshifted, IGNORE_INDEX where not a target. loss_weight: float32[B, T], aligned with the labels.
    Logits exist for a chunk of targets at a time.
    """
    shifted = labels[:, 1:].flatten()
    chosen = (shifted != IGNORE_INDEX).nonzero().squeeze(-1)
    target = shifted[chosen]
    rows = hidden[:, :-1].flatten(0, 1)[chosen]  # [N, H]
    weights = None if loss_weight is None else loss_weight[:, 1:].flatten()[chosen]
    if torch.is_autocast_enabled(rows.device.type):
        # What happens inside a custom function or torch's chunked loss is not autocast.
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if rows.dtype in (torch.float32, torch.float64) and hasattr(nn.functional, "linear_cross_entropy"):
        return _stock_chunks(rows, weight, bias, target, weights)
    return _own_chunks(rows, weight, bias, target, weights)


def _stock_chunks(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None) -> Tensor:
    """torch's own chunked loss, from torch 2.13 on."""
    losses: Tensor = nn.functional.linear_cross_entropy(
        rows,
        weight,
        target,
        linear_bias=bias,
        reduction="sum" if weights is None else "none",
        options=nn.LinearCrossEntropyOptions(),
    )
    return losses if weights is None else (losses * weights.to(losses)).sum()


def _own_chunks(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None) -> Tensor:
    """For an older torch, and for bfloat16, where torch's own gives and sums the losses in bfloat16.

    Each chunk's logits are made again in the backward pass, so that none are kept.
    """
    size = max(1, _CHUNK_LOGITS // weight.shape[0])
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for first in range(0, max(len(rows), 1), size):  # no targets at all: an empty chunk keeps the graph whole
        part = slice(first, first + size)
        total = total + checkpoint(
            _chunk_loss,
            rows[part],
            weight,
            bias,
            target[part],
            None if weights is None else weights[part],
            use_reentrant=False,
        )
    return total


def _chunk_loss(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None) -> Tensor:
    logits = nn.functional.linear(rows, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, target, reduction="none")
    return (losses if weights is None else losses * weights.to(losses)).sum()


class _HeadAtTargets:
    """A model's output head and loss function, replaced while the model is called with labels.

    The head then hands the hidden states on, and the loss function takes them through the head itself, where the
    targets are. All of it happens inside the model's forward, as DDP and FSDP need it.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear) -> None:
        self.head = head
        self.deferring = False
        head.forward = self.forward  # type: ignore[method-assign, assignment]
        model.loss_function = self.loss
        self.hooks = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.deferring = kwargs.get("labels") is not None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.deferring and output is not None:
            output["logits"] = None  # they are hidden states, which nobody must take for logits
        self.deferring = False
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self.deferring else nn.functional.linear(hidden, self.head.weight, self.head.bias)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        loss_weight: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `weighted_loss.weighted_loss`; `logits` are hidden states here."""
        total = target_loss(logits, self.head.weight, self.head.bias, labels, loss_weight)
        count = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def remove(self, model: PreTrainedModel, stock_loss: Any) -> None:
        del self.head.forward
        model.loss_function = stock_loss
        for hook in self.hooks:
            hook.remove()


def compute_loss_at_targets(model: PreTrainedModel) -> bool:
    """Have an attached model compute its loss from the rows that predict targets alone, in place. Whether that works.

    Called with labels, the model then gives the same `loss` and no `logits`; without labels it gives logits as before.
    A model that does something of its own between head and loss (capped or scaled logits, a head of another kind)
    would give another loss. That is tried on a short sequence, and such a model is left as it was.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        return False
    stock_loss = model.loss_function
    expected = _loss_of_a_few_tokens(model)
    deferred = _HeadAtTargets(model, head)
    found = _loss_of_a_few_tokens(model)
    if not abs(found - expected) <= 1e-3 * abs(expected):
        deferred.remove(model, stock_loss)
        return False
    return True


def _loss_of_a_few_tokens(model: PreTrainedModel) -> float:
    """The attached model's mean loss, causally, over a block of tokens from all over the vocabulary."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    length = BLOCK_SIZE  # which every backend takes
    tokens = (torch.arange(1, length + 1, device=model.device) * max(1, vocabulary // (length + 2))) % vocabulary
    row = torch.arange(length, dtype=torch.int32, device=model.device)[None]
    batch = {"input_ids": tokens[None], "labels": tokens[None], "doc_start": torch.zeros_like(row), "kv_end": row + 1}
    if takes_two_positions(model):
        batch |= {"position_ids": row + 1, "position_ids_2": torch.zeros_like(row)}
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            output = model(**batch)
    finally:
        model.train(training)
    return float(output.loss)
