"""Greedy answers to the contexts of packed shards, each given its conversation's true history.

What a model is fed are the shards' own tokens before the answer under its mask's own intervals, so it sees in each
context what it was trained to see there (law 3: the same as feeding it turn by turn with a cache).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from ismdata.data import PackedDataset
from ismdata.errors import UsageError
from ismdata.eval.answers import Answers
from ismdata.eval.likelihood import Progress
from ismdata.generate import Encoder, Prompt, end_of_turn, greedy_answers, positions_of
from ismdata.masks import intervals


def generate_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    dataset: PackedDataset,
    answers: Answers,
    chosen: Sequence[int],
    *,
    mask: str,
    max_new_tokens: int,
    progress: Progress = lambda done, total: None,
) -> list[list[int]]:
    """The tokens of the model's answer in the place of each chosen one, without its end of turn.

    model: attached and in evaluation mode. encoder: the shards'. answers: those of the dataset (`find_answers`), of
    which `chosen` are numbers. An answer ends at its end of turn, at an end-of-text token of the model's, after
    max_new_tokens, or with the model's positions. Raises UsageError for max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
    positions = positions_of(model)
    prompts = []
    for at in chosen:
        sequence = dataset[int(answers.row[at])].sequence
        _, kv_end = intervals(sequence.seq_lens, sequence.spans, seq_len=dataset.seq_len, mask=mask)
        begin, start = int(answers.document[at]), int(answers.start[at])
        second = sequence.position_ids_2
        prompts.append(
            Prompt(
                input_ids=sequence.input_ids[begin:start],
                kv_end=kv_end[begin:start] - np.int32(begin),
                position_ids=sequence.position_ids[begin:start],
                position_ids_2=np.zeros(start - begin, np.int32) if second is None else second[begin:start],
                limit=max_new_tokens if positions is None else min(max_new_tokens, positions - (start - begin)),
            )
        )
    return greedy_answers(model, prompts, end_of_turn(model, encoder), progress=progress)
