"""Choose the next token from logits, find the end of an answer, and decide which of its text can be shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ismdata.errors import UsageError

#: The character that a byte-level decoder puts in place of an incomplete one.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

#: (logits [V], tokens of the context and of the answer so far) -> the next token
Sampler = Callable[[Tensor, Sequence[int]], int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. Options have the meaning and the order of transformers' `generate`.

    Attributes:
        temperature: 0 takes the most likely token; above 0 a token is sampled.
        top_k: Sample from the k most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens of this total probability.
        min_p: Sample from tokens of at least this share of the most likely token's probability.
        repetition_penalty: Above 1, tokens that occur in the conversation become less likely.
        seed: Seed of the random numbers.

    Raises:
        UsageError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature is {self.temperature}; expected 0 or more")
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p is {self.min_p}; expected 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(f"--repetition-penalty is {self.repetition_penalty}; expected more than 0, 1 for none")


def make_sampler(sampling: Sampling, device: torch.device) -> Sampler:
    """Make the function that chooses the next token.

    Args:
        sampling: How to choose.
        device: The device of the logits.

    Returns:
        The function. It keeps the state of its random numbers from call to call.
    """
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    is_random = sampling.temperature > 0
    if is_random:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(sampling.min_p))
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def sample(logits: Tensor, ids: Sequence[int]) -> int:
        if not processors:
            return int(logits.argmax())
        # Only the penalty reads the tokens, and it depends on which occur, not on how often.
        seen = torch.tensor([sorted(set(ids))], dtype=torch.long, device=device)
        scores = processors(cast(LongTensor, seen), cast(FloatTensor, logits.float()[None]))[0]
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator) if is_random else scores.argmax())

    return sample


@dataclass(frozen=True, kw_only=True)
class EndOfTurn:
    """The tokens at which an answer ends.

    Attributes:
        ids: The end of turn that the template writes: one or several tokens, which belong to the answer; empty if the
            template writes none.
        stop_ids: Tokens that each end an answer without belonging to it.
    """

    ids: tuple[int, ...]
    stop_ids: frozenset[int]

    def is_stop(self, token: int) -> bool:
        """Whether a token ends the answer without belonging to it."""
        return token in self.stop_ids and token not in self.ids

    def is_complete(self, answer: Sequence[int]) -> bool:
        """Whether an answer ends with the end of turn."""
        return bool(self.ids) and tuple(answer[-len(self.ids) :]) == self.ids

    def missing(self, answer: Sequence[int]) -> list[int]:
        """The tokens of the end of turn that an answer does not have yet."""
        return list(self.ids[self._overlap(answer) :])

    def content(self, answer: Sequence[int]) -> list[int]:
        """An answer without its end of turn, or without the part of it that it has."""
        return list(answer[: len(answer) - self._overlap(answer)])

    def _overlap(self, answer: Sequence[int]) -> int:
        """Number of tokens at the end of an answer that are the beginning of the end of turn."""
        for length in range(min(len(answer), len(self.ids)), 0, -1):
            if tuple(answer[-length:]) == self.ids[:length]:
                return length
        return 0


def message_text(text: str, lead: str) -> str:
    """The content of an answer's message: its text without `lead`, which the template writes itself (`answer_lead`)."""
    return text.removeprefix(lead)


def can_show(text: str, lead: str) -> bool:
    """Whether the text of an unfinished answer can be shown: its last character is complete, and the lead is over."""
    return not text.endswith(_INCOMPLETE) and not (lead and lead.startswith(text))
