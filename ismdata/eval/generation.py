"""Generate greedy answers to the contexts of packed shards, each after its conversation's true history.

The model is fed the shards' own tokens before the answer, under the intervals of its mask. So it sees each context as
in training. Law 3 makes this equal to feeding the conversation turn by turn with a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from ismdata.data import PackedDataset
from ismdata.display import LOGGED, Reporter
from ismdata.errors import UsageError
from ismdata.eval.answers import Answers
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
    reporter: Reporter = LOGGED,
) -> list[list[int]]:
    """Generate the model's answer in place of each chosen one.

    An answer ends at its end of turn, at an end-of-text token of the model, after `max_new_tokens`, or at the model's
    last position.

    Args:
        model: An attached model in evaluation mode.
        encoder: The encoder of the shards.
        dataset: The packed shards.
        answers: All answers of the shards, from `find_answers`.
        chosen: Indices into `answers`.
        mask: The mask to run the model under.
        max_new_tokens: Maximum number of tokens in an answer.
        reporter: Receives the progress in answers.

    Returns:
        The tokens of each answer, in the order of `chosen`, without the end of turn.

    Raises:
        UsageError: If `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
    positions = positions_of(model)
    prompts = []
    for index in chosen:
        sequence = dataset[int(answers.row[index])].sequence
        _, kv_end = intervals(sequence.seq_lens, sequence.spans, seq_len=dataset.seq_len, mask=mask)
        begin, start = int(answers.document[index]), int(answers.start[index])
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
    return greedy_answers(model, prompts, end_of_turn(model, encoder), reporter=reporter)
