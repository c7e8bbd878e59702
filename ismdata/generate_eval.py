"""Greedy answers to the contexts of packed shards, each given its conversation's true history.

What a model is fed are the shards' own tokens before the answer under its mask's own intervals, so it sees in each
context what it was trained to see there (law 3: the same as feeding it turn by turn with a cache). Answers are made
many at a time: contexts of like length are filled up on the left, and no row sees the filling.

Shape legend: B answers of a batch, L tokens of its longest context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ismdata.answers import Answers
from ismdata.dataset import PackedDataset
from ismdata.errors import UsageError
from ismdata.evaluate import Progress
from ismdata.masks import intervals

#: Tokens of a batch's contexts and answers together: what bounds its cache, and the answers of a batch.
_BATCH_TOKENS = 1 << 15
_BATCH_ANSWERS = 64


class Endings(Protocol):
    """What generation needs of `encoder.ConversationEncoder`."""

    @property
    def end_of_turn_ids(self) -> list[int]:
        """The tokens that together end an answer; empty where the template writes none."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The tokens before an answer, and the keys [0, kv_end) that each sees. int32[length] each."""

    input_ids: NDArray[np.int32]
    kv_end: NDArray[np.int32]


def contexts(dataset: PackedDataset, answers: Answers, chosen: Sequence[int], *, mask: str) -> list[Context]:
    """What comes before each of the chosen answers in its document, as the model sees it under the mask."""
    found = []
    for at in chosen:
        sequence = dataset[int(answers.row[at])].sequence
        _, kv_end = intervals(sequence.seq_lens, sequence.spans, seq_len=dataset.seq_len, mask=mask)
        begin, start = int(answers.document[at]), int(answers.start[at])
        found.append(Context(input_ids=sequence.input_ids[begin:start], kv_end=kv_end[begin:start] - np.int32(begin)))
    return found


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    encoder: Endings,
    prompts: Sequence[Context],
    *,
    max_new_tokens: int,
    progress: Progress = lambda done, total: None,
) -> list[list[int]]:
    """The likeliest answer to each context token by token, without its end of turn.

    model: attached and in evaluation mode. An answer ends at its end of turn, at an end-of-text token of the model's,
    after max_new_tokens, or with the model's positions. Raises UsageError for max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in _batches([len(prompt.input_ids) for prompt in prompts], max_new_tokens):
        parts = [prompts[at] for at in batch]
        limits = [
            max_new_tokens if positions is None else min(max_new_tokens, positions - len(part.input_ids))
            for part in parts
        ]
        for at, answer in zip(batch, _greedy(model, encoder.end_of_turn_ids, parts, limits), strict=True):
            answers[at] = answer
        done += len(batch)
        progress(done, len(prompts))
    return answers


def _batches(lengths: Sequence[int], max_new_tokens: int) -> Iterator[list[int]]:
    """Numbers of contexts to go together, the longest first, so that what is too much shows at once."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        longest = lengths[batch[0]] if batch else lengths[at]
        full = (len(batch) + 1) * (longest + max_new_tokens) > _BATCH_TOKENS or len(batch) == _BATCH_ANSWERS
        if batch and full:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _greedy(
    model: PreTrainedModel, ending: list[int], prompts: Sequence[Context], limits: Sequence[int]
) -> list[list[int]]:
    """Answers of one batch. limits: the most tokens of each."""
    answers: list[list[int]] = [[] for _ in prompts]
    # A template may let the model begin a conversation: then there is nothing to begin from.
    going = [at for at, prompt in enumerate(prompts) if len(prompt.input_ids) and limits[at] > 0]
    if not going:
        return answers
    stops = _end_of_text(model) - set(ending)
    cache = DynamicCache(config=model.config)
    tokens, doc_start, kv_end = _left_filled([prompts[at] for at in going], model.device)
    fill = doc_start[:, -1:]
    logits = _feed(model, tokens, doc_start, kv_end, cache)
    while True:
        chosen = logits.argmax(-1)
        kept = []
        for place, token in enumerate(chosen.tolist()):
            answer = answers[going[place]]
            if token in stops:
                continue
            answer.append(token)
            if ending and answer[-len(ending) :] == ending:
                del answer[-len(ending) :]
            elif len(answer) < limits[going[place]]:
                kept.append(place)
        if not kept:
            return [_without_part(answer, ending) for answer in answers]
        if len(kept) < len(going):
            rows = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(rows)
            chosen, fill = chosen[rows], fill[rows]
            going = [going[place] for place in kept]
        row_end = torch.full_like(fill, cache.get_seq_length() + 1)
        logits = _feed(model, chosen[:, None], fill, row_end, cache)


def _left_filled(prompts: Sequence[Context], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, doc_start and kv_end, [B, L] each: contexts with filling on the left, which sees itself alone."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), np.int64)
    doc_start = np.tile(np.arange(longest, dtype=np.int32), (len(prompts), 1))
    kv_end = doc_start + 1
    for place, prompt in enumerate(prompts):
        fill = longest - len(prompt.input_ids)
        tokens[place, fill:] = prompt.input_ids
        doc_start[place, fill:] = fill
        kv_end[place, fill:] = prompt.kv_end + fill
    return (
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(doc_start).to(device),
        torch.from_numpy(kv_end).to(device),
    )


def _feed(model: PreTrainedModel, tokens: Tensor, doc_start: Tensor, kv_end: Tensor, cache: DynamicCache) -> Tensor:
    """Run tokens [B, rows] after what the cache holds; the last row's logits, [B, V]."""
    output = model(
        input_ids=tokens, doc_start=doc_start, kv_end=kv_end, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _without_part(answer: list[int], ending: list[int]) -> list[int]:
    """An answer that was cut off inside its end of turn, without what there is of it."""
    for length in range(min(len(answer), len(ending)), 0, -1):
        if answer[-length:] == ending[:length]:
            return answer[:-length]
    return answer


def _end_of_text(model: PreTrainedModel) -> set[int]:
    config: Any = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
