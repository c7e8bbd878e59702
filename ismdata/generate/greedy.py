"""Greedy decoding of many prompts in batches.

Prompts of a batch are padded on the left: row b starts at `doc_start[b]`, and each token of padding sees only itself.
So batching changes an answer only by rounding.

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
from ismdata.generate.whole_cache import whole_cache

#: Maximum number of tokens in a batch, padding and answers included; it bounds the cache.
_BATCH_TOKENS = 1 << 15
_BATCH_PROMPTS = 64

#: The columns of a prompt, by the names of the model's inputs. Only models of the GLM layout take `position_ids_2`.
_COLUMNS = ("input_ids", "kv_end", "position_ids", "position_ids_2")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The tokens before an answer. Columns are int32[tokens]; token t sees the keys [0, kv_end[t]).

    Attributes:
        input_ids: The tokens. In the GLM layout the last one is the answer's `[START]`.
        kv_end: The end of each token's attention interval.
        position_ids: Position 1 of each token.
        position_ids_2: Position 2 of each token in the GLM layout, else zeros.
        limit: Maximum number of tokens in the answer. The answer is empty if it is below 1 or the prompt is empty.
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
    """Decode an answer to each prompt greedily.

    Args:
        model: An attached model in evaluation mode.
        prompts: The prompts.
        end: The end of answers.
        batch_size: Maximum number of prompts in a batch. Batches of long prompts are smaller.
        reporter: Receives the progress in prompts.

    Returns:
        The tokens of each answer, in the order of the prompts, without the end of turn.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in _batches(prompts, batch_size):
        # A prompt is empty if the template lets the model begin the conversation and writes nothing before that.
        decoded = [index for index in batch if len(prompts[index]) and prompts[index].limit > 0]
        if decoded:
            batch_answers = _decode_batch(model, [prompts[index] for index in decoded], end)
            for index, answer in zip(decoded, batch_answers, strict=True):
                answers[index] = end.content(answer)
        done += len(batch)
        reporter.progress("generate", done, len(prompts))
    return answers


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, sorted by length. The longest come first, so that memory runs out early."""
    batch: list[int] = []
    longest = answer = 0
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        longest, answer = max(longest, len(prompts[index])), max(answer, prompts[index].limit)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (longest + answer) > _BATCH_TOKENS):
            yield batch
            batch, longest, answer = [], len(prompts[index]), prompts[index].limit
        batch.append(index)
    if batch:
        yield batch


def _decode_batch(model: PreTrainedModel, prompts: Sequence[Prompt], end: EndOfTurn) -> list[list[int]]:
    """The answers to a batch, with their ends of turn. Rows are removed from the batch when their answers end."""
    answers: list[list[int]] = [[] for _ in prompts]
    two_positions = takes_two_positions(model)
    columns = pad_left(prompts, model.device)
    cache = whole_cache(model)
    active = list(range(len(prompts)))
    while True:
        tokens = _forward(model, columns, cache, two_positions=two_positions).argmax(-1)
        kept = []
        for row, token in enumerate(tokens.tolist()):
            answer = answers[active[row]]
            if end.is_stop(token):
                continue
            answer.append(token)
            if not end.is_complete(answer) and len(answer) < prompts[active[row]].limit:
                kept.append(row)
        if not kept:
            return answers
        last = {name: column[:, -1:] for name, column in columns.items()}
        if len(kept) < len(active):
            rows = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(rows)
            tokens, last = tokens[rows], {name: column[rows] for name, column in last.items()}
            active = [active[row] for row in kept]
        # In the GLM layout position 1 is constant within an answer, and position 2 counts its tokens.
        counting = "position_ids_2" if two_positions else "position_ids"
        columns = {**last, "input_ids": tokens[:, None], counting: last[counting] + 1}
        columns["kv_end"] = torch.full_like(last["kv_end"], cache.get_seq_length() + 1)


def pad_left(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
    """The columns of the prompts and `doc_start`, [B, L] each: the intervals int32, the rest int64."""
    longest = max(map(len, prompts))
    own = np.arange(longest, dtype=np.int32)  # a token of padding sees only itself
    padded = {name: np.zeros((len(prompts), longest), np.int64) for name in _COLUMNS}
    padded |= {"doc_start": np.tile(own, (len(prompts), 1)), "kv_end": np.tile(own + 1, (len(prompts), 1))}
    for row, prompt in enumerate(prompts):
        padding = longest - len(prompt)
        for name in _COLUMNS:
            padded[name][row, padding:] = getattr(prompt, name)
        padded["doc_start"][row, padding:] = padding
        padded["kv_end"][row, padding:] += padding
    return {name: torch.from_numpy(column).to(device) for name, column in padded.items()}


def _forward(model: PreTrainedModel, columns: dict[str, Tensor], cache: DynamicCache, *, two_positions: bool) -> Tensor:
    """Run columns, [B, n], after the entries of the cache, and extend it. Returns the last logits, [B, V]."""
    inputs = {name: column for name, column in columns.items() if two_positions or name != "position_ids_2"}
    logits: Tensor = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]
