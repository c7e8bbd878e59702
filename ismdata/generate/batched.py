"""Answer many conversations in batches, greedily. Each answer is the one that a session would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ismdata.attention import takes_two_positions
from ismdata.errors import DataError, UsageError
from ismdata.generate.feeding import Block, Encoder, answer_lead, arrange_blocks, as_encoder
from ismdata.generate.greedy import Prompt, greedy_answers, pad_left
from ismdata.generate.model_facts import end_of_turn, glm_tokens, resolve_mask
from ismdata.generate.sampling import message_text
from ismdata.generate.transcript import Transcript
from ismdata.generate.window import Window, context_size
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
    encoder = as_encoder(encoder)
    mask = resolve_mask(model, mask)
    end = end_of_turn(model, encoder)
    prompts, leads = _prompts(model, encoder, conversations, tools, mask, max_new_tokens)
    answers = greedy_answers(model, prompts, end, batch_size=batch_size)
    return [message_text(encoder.decode(ids), lead) for ids, lead in zip(answers, leads, strict=True)]


def generation_inputs(
    model: PreTrainedModel,
    encoder: Encoder | PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    tools: Sequence[list[Any] | None] | None = None,
    mask: str | None = None,
) -> dict[str, Tensor]:
    """Encode conversations for `model.generate(**inputs)`, with what each token of the prompts sees.

    Sampling, beams, streamers and the stopping criteria are those of transformers; pass the template's end of turn as
    `eos_token_id` if the model's generation config does not name it. `answer_many` needs neither.

    Args:
        model: An attached model.
        encoder: A `ConversationEncoder`, or a Hugging Face tokenizer with a chat template.
        conversations: Conversations in the form that templates take; the last message of each is not the model's.
        tools: The tools of each conversation.
        mask: The mask to run the model under; None for the one in its config.

    Returns:
        `input_ids`, `attention_mask` (padding on the left) and `kv_end`, int64[B, L] each, on the model's device.

    Raises:
        UsageError: If the call is wrong, or the model has two positions per token, which `generate` does not count.
        DataError: If a conversation, counted from 1, does not fit into the model or its template.

    Example:
        >>> inputs = generation_inputs(model, tokenizer, [messages])      # doctest: +SKIP
        >>> model.generate(**inputs, max_new_tokens=64, num_beams=4)      # doctest: +SKIP
    """
    encoder = as_encoder(encoder)
    mask = resolve_mask(model, mask)
    if takes_two_positions(model):
        raise UsageError(
            f"{type(model).__name__} has two positions per token, which generate does not count. Use answer_many"
        )
    prompts, _ = _prompts(model, encoder, conversations, tools, mask, 1)
    if not all(map(len, prompts)):
        raise UsageError("a prompt is empty: the template writes nothing before the first answer. Use answer_many")
    columns = pad_left(prompts, model.device)
    start = columns["doc_start"][:, -1:]  # the last token is never padding
    columns["attention_mask"] = (torch.arange(columns["input_ids"].shape[1], device=start.device) >= start).long()
    return {name: columns[name] for name in ("input_ids", "attention_mask", "kv_end")}


def _prompts(
    model: PreTrainedModel,
    encoder: Encoder,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[list[Any] | None] | None,
    mask: str,
    limit: int,
) -> tuple[list[Prompt], list[str]]:
    """The prompts for answers of at most `limit` tokens, and the text that the template writes before each answer."""
    if tools is not None and len(tools) != len(conversations):
        raise UsageError(f"tools has {len(tools)} entries; expected one for each of {len(conversations)} conversations")
    glm = glm_tokens(model, encoder, mask)
    end = end_of_turn(model, encoder)
    positions = context_size(model, Window())
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
        prompt = _prompt(blocks, glm, mask, limit)
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"{place}: has {len(prompt)} tokens before the answer; the model has {positions} positions, which must "
                "hold the answer too. Leave it out, or use a model with more positions"
            )
        if positions is not None:  # leave room for the end of turn, as a session does
            room = max(1, positions - len(prompt) - len(end.ids))
            prompt = replace(prompt, limit=min(limit, room))
        prompts.append(prompt)
    return prompts, leads


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
