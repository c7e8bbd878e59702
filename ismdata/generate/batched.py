"""Answer many conversations in batches, greedily. Each answer is the one that a session would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ismdata.errors import DataError, UsageError
from ismdata.generate.feeding import Block, Encoder, answer_lead, arrange_blocks, as_encoder
from ismdata.generate.greedy import Prompt, greedy_answers
from ismdata.generate.model_facts import end_of_turn, glm_tokens, positions_of, resolve_mask
from ismdata.generate.sampling import message_text
from ismdata.generate.transcript import Transcript
from ismdata.masks import block_positions
from ismdata.rendering import GlmTokens, Message


def answer_many(
    model: PreTrainedModel,
    encoder: Encoder | PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    tools: Sequence[list[Any] | None] | None = None,
    max_new_tokens: int = 512,
    mask: str | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Answer each conversation as `Session.answer` does at temperature 0.

    Args:
        model: An attached model in evaluation mode.
        encoder: A `ConversationEncoder`, or a Hugging Face tokenizer with a chat template.
        conversations: Conversations in the form that templates take; the last message of each is not the model's.
        tools: The tools of each conversation.
        max_new_tokens: Maximum number of tokens in an answer.
        mask: The mask to run the model under; None for the one in its config.
        batch_size: Maximum number of conversations in a batch. It changes answers only by rounding.

    Returns:
        The text of each answer, in the order of the conversations.

    Raises:
        UsageError: If the call is wrong.
        DataError: If a conversation, counted from 1, does not fit into the model or its template.
    """
    for option, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise UsageError(f"{option} is {count}; expected 1 or more")
    if tools is not None and len(tools) != len(conversations):
        raise UsageError(f"tools has {len(tools)} entries; expected one for each of {len(conversations)} conversations")
    encoder = as_encoder(encoder)
    mask = resolve_mask(model, mask)
    glm = glm_tokens(model, encoder, mask)
    end = end_of_turn(model, encoder)
    positions = positions_of(model)
    prompts, leads = [], []
    for number, messages in enumerate(conversations):
        place = f"conversation {number + 1}"
        if not messages or messages[-1]["role"] == "assistant":
            raise UsageError(f"{place}: nothing to answer; expected a last message that is not the model's")
        its_tools = None if tools is None else tools[number]
        try:
            blocks = Transcript(messages=list(messages), tools=its_tools).blocks(encoder)
            leads.append(answer_lead(encoder, messages, its_tools))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        prompt = _prompt(blocks, glm, mask, max_new_tokens)
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"{place}: has {len(prompt)} tokens before the answer; the model has {positions} positions, which must "
                "hold the answer too"
            )
        if positions is not None:  # leave room for the end of turn, as a session does
            room = max(1, positions - len(prompt) - len(end.ids))
            prompt = replace(prompt, limit=min(max_new_tokens, room))
        prompts.append(prompt)
    answers = greedy_answers(model, prompts, end, batch_size=batch_size)
    return [message_text(encoder.decode(ids), lead) for ids, lead in zip(answers, leads, strict=True)]


def _prompt(blocks: Sequence[Block], glm: GlmTokens | None, mask: str, limit: int) -> Prompt:
    """The prompt that ends with the context before an answer."""
    blocks = arrange_blocks(blocks, glm, mask)
    ids: list[int] = []
    kv_end: list[int] = []
    for block in blocks:
        past = len(ids)
        ids += block.ids
        causal = block.is_answer or mask == "causal"
        kv_end += range(past + 1, len(ids) + 1) if causal else [len(ids)] * len(block.ids)
    if glm is None:
        first, second = list(range(len(ids))), [0] * len(ids)
    else:
        first, second = block_positions([(block.is_answer, block.ids) for block in blocks])
        first, second = [*first, len(ids)], [*second, 1]
        ids.append(glm.start_id)
        kv_end = [len(ids)] * len(ids) if mask == "prefix" else [*kv_end, len(ids)]
    return Prompt(
        input_ids=np.array(ids, np.int32),
        kv_end=np.array(kv_end, np.int32),
        position_ids=np.array(first, np.int32),
        position_ids_2=np.array(second, np.int32),
        limit=limit,
    )
