"""The canary of `attach`: does the mask really hold inside this very model?

A document packed twice under causal intervals must give, both times, the logits that the model gave by itself:
positions restart, documents are apart, and nothing of the model's attention (sinks, capped scores, biases) was lost on
the way. And changing a token must change exactly the rows that see it (law 4), tried on every pair of a tiny packed
sequence. A few small forwards, no gradients, nothing kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ismdata import glm, masks
from ismdata.errors import UnsupportedModelError
from ismdata.masks import ANSWER, PROMPT, QUERY

IntArray = NDArray[np.int32]

#: Two documents and padding: prompt, query, answer, query, answer | query, answer.
_SEQ_LEN = 16
_SEQ_LENS = [8, 6]
_SPANS = [
    (0, 1, PROMPT, 0),
    (1, 3, QUERY, 0),
    (3, 5, ANSWER, 1),
    (5, 7, QUERY, 0),
    (7, 8, ANSWER, 1),
    (8, 11, QUERY, 0),
    (11, 14, ANSWER, 1),
]
_HALVES = [_SEQ_LEN // 2] * 2
_HALF_SPANS = [(0, _SEQ_LEN // 2, ANSWER, 1), (_SEQ_LEN // 2, _SEQ_LEN, ANSWER, 1)]


def stock_logits(model: PreTrainedModel) -> Tensor:
    """float32[T / 2, V]: what the model, before anything is attached, makes of half the canary's tokens."""
    with _quiet(model):
        return _logits(model(input_ids=_tokens(model)[None, : _SEQ_LEN // 2], use_cache=False))[0]


def check_attached(model: PreTrainedModel, stock: Tensor) -> None:
    """Raise UnsupportedModelError unless the attached model keeps to the intervals and to its `stock_logits`."""
    name = type(model).__name__
    tokens = _tokens(model)
    length = _SEQ_LEN
    eps = torch.finfo(model.dtype).eps

    twice = tokens[: length // 2].repeat(1, 2)
    with _quiet(model):
        causal = _forward(model, twice, *masks.intervals(_HALVES, _HALF_SPANS, seq_len=length, mask="causal"))[0]
    scale = float(stock.abs().max())
    difference = float((causal - stock.repeat(2, 1)).abs().max())
    if not difference <= max(8 * eps, 1e-3) * scale:
        raise UnsupportedModelError(
            f"{name} gives other logits once attached (largest difference {difference:.3g}, logits up to {scale:.3g}), "
            "even for documents under the causal mask: its attention or its positions do something that intervals "
            "cannot carry. Use another model"
        )

    doc_start, kv_end = masks.intervals(_SEQ_LENS, _SPANS, seq_len=length, mask="ism")
    sees = torch.from_numpy(masks.dense(doc_start, kv_end))  # bool[T, T]
    with _quiet(model):
        base, *changed = _forward(model, _perturbed(tokens), doc_start, kv_end)
    change = torch.stack([(row - base).abs().amax(-1) for row in changed], dim=1).cpu()  # [T rows, T perturbed tokens]
    threshold = max(2 * eps, 1e-5) * float(base.abs().max())
    leak = (change > threshold) & ~sees
    if leak.any() or not change.isfinite().all():
        row, token = (int(index) for index in (leak | ~change.isfinite()).nonzero()[0])
        raise UnsupportedModelError(
            f"{name} does not keep to the mask: changing token {token} changes row {row}, which must not see it. "
            "Its layers mix tokens outside the attention that the mask governs. Use another model"
        )
    # A trained head may all but ignore a single token, so most pairs are asked for and not all.
    ahead = sees & torch.ones_like(sees).triu(1)
    for pairs, what in ((sees, "what it may see"), (ahead, "the context block ahead of it")):
        if (change > threshold)[pairs].float().mean() < 0.5:
            raise UnsupportedModelError(
                f"{name} does not look at {what}: changing tokens there changes too few of the rows that see them. "
                "It has a causal or local restriction of its own, or weights that pass nothing on. Use another model"
            )


def loss_is_weighed(model: PreTrainedModel) -> bool:
    """Whether a batch's `loss_weight` reaches the attached model's loss: with weights of zero the loss is zero."""
    tokens = _tokens(model)[None]
    intervals = masks.intervals([_SEQ_LEN], [(0, _SEQ_LEN, ANSWER, 1)], seq_len=_SEQ_LEN, mask="causal")
    with _quiet(model):
        weights = torch.zeros(tokens.shape, device=tokens.device)
        output = _call(model, tokens, *intervals, labels=tokens, loss_weight=weights)
    return float(output.loss) == 0.0


def _tokens(model: PreTrainedModel) -> Tensor:
    """int64[T]: distinct tokens from all over the vocabulary where it is large enough."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    return (torch.arange(1, _SEQ_LEN + 1, device=model.device) * max(1, vocabulary // (_SEQ_LEN + 2))) % vocabulary


def _perturbed(tokens: Tensor) -> Tensor:
    """int64[1 + T, T]: the tokens, then for each place a copy with another token there."""
    copies = tokens.repeat(_SEQ_LEN + 1, 1)
    place = torch.arange(_SEQ_LEN, device=tokens.device)
    copies[place + 1, place] = tokens.roll(_SEQ_LEN // 2)
    return copies


def _forward(model: PreTrainedModel, tokens: Tensor, doc_start: IntArray, kv_end: IntArray) -> Tensor:
    """float32[B, T, V]"""
    return _logits(_call(model, tokens, doc_start, kv_end))


def _call(model: PreTrainedModel, tokens: Tensor, doc_start: IntArray, kv_end: IntArray, **others: Tensor) -> Any:
    intervals = {
        name: torch.from_numpy(ends).to(tokens.device).expand(tokens.shape)
        for name, ends in (("doc_start", doc_start), ("kv_end", kv_end))
    }
    if glm.takes_two_positions(model):  # all tokens as context, as the model by itself has them
        first = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) - intervals["doc_start"]
        intervals |= {"position_ids": first, "position_ids_2": torch.zeros_like(first)}
    return model(input_ids=tokens, use_cache=False, **intervals, **others)


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            "the model returns no logits; expected a causal language model (AutoModelForCausalLM)"
        )
    return logits.float()


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients and an untouched random state, all put back."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.train(False)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
