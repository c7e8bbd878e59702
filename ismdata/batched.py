"""Answers to many conversations at once, greedily: what an evaluation asks for.

Conversations of different lengths stand in one batch, their ends aligned: row b's tokens begin at `doc_start[b]`, and
the intervals keep what is before them unseen, so every answer is the one that a session would give alone.

Shape legend: B conversations, Q tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ismdata import glm_layout
from ismdata.decoding import EndOfTurn, message_text
from ismdata.errors import DataError, UsageError
from ismdata.feeding import Block, Encoder, answer_lead, as_encoder, with_markers
from ismdata.glm import takes_two_positions
from ismdata.session import checked_mask, end_of_turn, glm_tokens, positions_of
from ismdata.template import Message
from ismdata.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """All that one conversation feeds before its answer. Each list is int[tokens]."""

    number: int
    ids: list[int]
    kv_end: list[int]
    #: Position 1 and position 2; the second is for models in the GLM layout.
    positions: tuple[list[int], list[int]]
    #: Where the answer begins, with what opens it.
    start: int
    #: What the template writes at the beginning of the answer.
    lead: str


@torch.no_grad()
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
    """The model's answer to each conversation, in order: what `Session.answer` gives at temperature 0.

    model: attached and in evaluation mode. conversations: messages as templates take them, the last one not the
    model's own. tools: those of each conversation. mask: by default the one in the model's config. The batch size
    changes no answer but for rounding. Raises UsageError, and DataError naming the conversation (counted from 1).
    """
    for option, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise UsageError(f"{option} is {count}; expected 1 or more")
    if tools is not None and len(tools) != len(conversations):
        raise UsageError(f"tools are {len(tools)}; expected one entry for each of {len(conversations)} conversations")
    encoder = as_encoder(encoder)
    mask = checked_mask(model, mask)
    prompts = [
        _prompt(model, encoder, messages, None if tools is None else tools[number], mask, number)
        for number, messages in enumerate(conversations)
    ]
    prompts.sort(key=lambda prompt: len(prompt.ids))  # conversations of like lengths waste the least
    end = end_of_turn(model, encoder)
    answers = [""] * len(prompts)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        for prompt, ids in zip(batch, _answer_batch(model, batch, end, max_new_tokens), strict=True):
            answers[prompt.number] = message_text(encoder.decode(end.content(ids)), prompt.lead)
    return answers


def _prompt(
    model: PreTrainedModel,
    encoder: Encoder,
    messages: Sequence[Message],
    tools: list[Any] | None,
    mask: str,
    number: int,
) -> _Prompt:
    place = f"conversation {number + 1}"
    if not messages or messages[-1]["role"] == "assistant":
        raise UsageError(f"{place}: nothing to answer; expected a last message that is not the model's own")
    try:
        blocks = Transcript(messages=list(messages), tools=tools).blocks(encoder)
        lead = answer_lead(encoder, messages, tools)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    glm = glm_tokens(model, encoder, mask)
    if glm is not None:
        blocks = with_markers(blocks, glm)
    if mask == "prefix":
        blocks = [Block([id for block in blocks for id in block.ids])]
    ids: list[int] = []
    kv_end: list[int] = []
    for block in blocks:
        past = len(ids)
        ids += block.ids
        causal = block.is_answer or mask == "causal"
        kv_end += range(past + 1, len(ids) + 1) if causal else [len(ids)] * len(block.ids)
    start = len(ids)
    if glm is None:
        positions = list(range(start)), [0] * start
    else:
        positions = glm_layout.block_positions([(block.is_answer, block.ids) for block in blocks])
        ids.append(glm.start_id)
        kv_end = [len(ids)] * len(ids) if mask == "prefix" else [*kv_end, len(ids)]
        positions = positions[0] + [start], positions[1] + [1]
    most = positions_of(model)
    if most is not None and len(ids) >= most:
        raise DataError(f"{place}: it has {len(ids)} tokens; the model has {most} positions, with the answer")
    return _Prompt(number=number, ids=ids, kv_end=kv_end, positions=positions, start=start, lead=lead)


def _answer_batch(
    model: PreTrainedModel, prompts: Sequence[_Prompt], end: EndOfTurn, max_new_tokens: int
) -> list[list[int]]:
    """The tokens of each answer; rows leave the batch as their answers end."""
    width = max(len(prompt.ids) for prompt in prompts)
    most = positions_of(model)
    answers: list[list[int]] = [[] for _ in prompts]
    limits = [
        max_new_tokens if most is None else max(1, min(max_new_tokens, most - len(prompt.ids) - len(end.ids)))
        for prompt in prompts
    ]
    cache = DynamicCache(config=model.config)
    logits = _forward(model, _prefill(prompts, width), cache)
    rows = list(range(len(prompts)))
    while True:
        going = []
        for at, (row, token) in enumerate(zip(rows, logits.argmax(-1).tolist(), strict=True)):
            if end.stops(token):
                continue
            answers[row].append(token)
            if not end.complete(answers[row]) and len(answers[row]) < limits[row]:
                going.append(at)
        if not going:
            return answers
        if len(going) < len(rows):
            cache.batch_select_indices(torch.tensor(going, device=model.device))
            rows = [rows[at] for at in going]
        step = len(answers[rows[0]])
        logits = _forward(
            model, _step([prompts[row] for row in rows], [answers[row][-1] for row in rows], width, step), cache
        )


def _prefill(prompts: Sequence[_Prompt], width: int) -> dict[str, list[list[int]]]:
    """int[B, Q] each: conversations aligned at their ends; what is before them sees itself alone."""
    columns: dict[str, list[list[int]]] = {
        name: [] for name in ("input_ids", "doc_start", "kv_end", "position_ids", "position_ids_2")
    }
    for prompt in prompts:
        pad = width - len(prompt.ids)
        alone = list(range(pad))
        columns["input_ids"].append([0] * pad + prompt.ids)
        columns["doc_start"].append(alone + [pad] * len(prompt.ids))
        columns["kv_end"].append([at + 1 for at in alone] + [pad + end for end in prompt.kv_end])
        for name, places in zip(("position_ids", "position_ids_2"), prompt.positions, strict=True):
            columns[name].append([0] * pad + places)
    return columns


def _step(prompts: Sequence[_Prompt], tokens: Sequence[int], width: int, step: int) -> dict[str, list[list[int]]]:
    """int[B, 1] each: the newest token of each answer, the `step`-th of it."""
    positions = [
        (len(prompt.ids) + step - 1, 0)
        if prompt.start == len(prompt.ids)
        else (prompt.start, len(prompt.ids) - prompt.start + step)
        for prompt in prompts
    ]
    return {
        "input_ids": [[token] for token in tokens],
        "doc_start": [[width - len(prompt.ids)] for prompt in prompts],
        "kv_end": [[width + step] for _ in prompts],
        "position_ids": [[first] for first, _ in positions],
        "position_ids_2": [[second] for _, second in positions],
    }


def _forward(model: PreTrainedModel, columns: dict[str, list[list[int]]], cache: DynamicCache) -> Tensor:
    """The logits of the last column, [B, V]."""
    batch = {name: torch.tensor(rows, device=model.device) for name, rows in columns.items()}
    for name in ("doc_start", "kv_end"):
        batch[name] = batch[name].int()
    if not takes_two_positions(model):
        del batch["position_ids_2"]
    output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits
