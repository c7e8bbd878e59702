"""The likeliest answers to many prompts at once, token by token: what evaluations ask for.

Prompts of different lengths stand in one batch with their ends aligned: row b begins at `doc_start[b]`, and what fills
it up before that sees itself alone, so each answer is the one that its prompt would get alone, but for rounding.

Shape legend: B prompts of a batch, L tokens of its longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ismdata.attention import takes_two_positions
from ismdata.display import LOGGED, Reporter
from ismdata.generate.sampling import EndOfTurn

#: Tokens of a batch's prompts and answers together: what bounds its cache.
_BATCH_TOKENS = 1 << 15
_BATCH_PROMPTS = 64

#: The columns of a prompt, as the model is fed them. `position_ids_2` is there for the GLM layout alone.
_COLUMNS = ("input_ids", "kv_end", "position_ids", "position_ids_2")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """All that is fed before an answer, int32[tokens] each. Token t sees the keys [0, kv_end[t]).

    position_ids_2: in the GLM layout, where a prompt ends with the `[START]` of its answer; zeros elsewhere. limit: the
    most tokens of the answer, which is empty where that is below 1 or the prompt has no token to begin from.
    """

    input_ids: NDArray[np.int32]
    kv_end: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    position_ids_2: NDArray[np.int32]
    limit: int

    def __len__(self) -> int:
        return len(self.input_ids)


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    end: EndOfTurn,
    *,
    batch_size: int = _BATCH_PROMPTS,
    reporter: Reporter = LOGGED,
) -> list[list[int]]:
    """The tokens of the likeliest answer to each prompt, in order, without their end of turn.

    model: attached and in evaluation mode. end: where answers end, but for each prompt's limit. batch_size: the most
    prompts at a time; fewer where they are long. reporter: receives the progress in prompts.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in _batches(prompts, batch_size):
        # A template may let the model begin a conversation: then there is nothing to begin from.
        fed = [at for at in batch if len(prompts[at]) and prompts[at].limit > 0]
        if fed:
            for at, answer in zip(fed, _answer_batch(model, [prompts[at] for at in fed], end), strict=True):
                answers[at] = end.content(answer)
        done += len(batch)
        reporter.progress("generate", done, len(prompts))
    return answers


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts to go together, of like lengths, the longest first, so that what is too much shows at once."""
    batch: list[int] = []
    longest = answer = 0
    for at in sorted(range(len(prompts)), key=lambda at: -len(prompts[at])):
        longest, answer = max(longest, len(prompts[at])), max(answer, prompts[at].limit)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (longest + answer) > _BATCH_TOKENS):
            yield batch
            batch, longest, answer = [], len(prompts[at]), prompts[at].limit
        batch.append(at)
    if batch:
        yield batch


def _answer_batch(model: PreTrainedModel, prompts: Sequence[Prompt], end: EndOfTurn) -> list[list[int]]:
    """The answers to one batch, with as much of their end of turn as was chosen. Rows leave as their answers end."""
    answers: list[list[int]] = [[] for _ in prompts]
    two_positions = takes_two_positions(model)
    columns = _ends_aligned(prompts, model.device)
    cache = DynamicCache(config=model.config)
    going = list(range(len(prompts)))
    while True:
        chosen = _feed(model, columns, cache, two_positions=two_positions).argmax(-1)
        kept = []
        for place, token in enumerate(chosen.tolist()):
            answer = answers[going[place]]
            if end.stops(token):
                continue
            answer.append(token)
            if not end.complete(answer) and len(answer) < prompts[going[place]].limit:
                kept.append(place)
        if not kept:
            return answers
        last = {name: column[:, -1:] for name, column in columns.items()}
        if len(kept) < len(going):
            rows = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(rows)
            chosen, last = chosen[rows], {name: column[rows] for name, column in last.items()}
            going = [going[place] for place in kept]
        # In the GLM layout position 1 stands still in an answer, and position 2 counts.
        moving = "position_ids_2" if two_positions else "position_ids"
        columns = {**last, "input_ids": chosen[:, None], moving: last[moving] + 1}
        columns["kv_end"] = torch.full_like(last["kv_end"], cache.get_seq_length() + 1)


def _ends_aligned(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
    """The prompts' columns and `doc_start`, [B, L] each: int32 the intervals, int64 the rest."""
    longest = max(map(len, prompts))
    alone = np.arange(longest, dtype=np.int32)
    filled = {name: np.zeros((len(prompts), longest), np.int64) for name in _COLUMNS}
    filled |= {"doc_start": np.tile(alone, (len(prompts), 1)), "kv_end": np.tile(alone + 1, (len(prompts), 1))}
    for row, prompt in enumerate(prompts):
        fill = longest - len(prompt)
        for name in _COLUMNS:
            filled[name][row, fill:] = getattr(prompt, name)
        filled["doc_start"][row, fill:] = fill
        filled["kv_end"][row, fill:] += fill
    return {name: torch.from_numpy(column).to(device) for name, column in filled.items()}


def _feed(model: PreTrainedModel, columns: dict[str, Tensor], cache: DynamicCache, *, two_positions: bool) -> Tensor:
    """Run columns [B, rows] after what the cache holds, which grows by them; the last row's logits, [B, V]."""
    fed = {name: column for name, column in columns.items() if two_positions or name != "position_ids_2"}
    logits: Tensor = model(**fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]
