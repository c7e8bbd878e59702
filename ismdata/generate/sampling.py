"""From logits to the next token, and from an answer's tokens to the text that can be shown."""

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

#: What a byte-level decoder prints for a character that is not complete yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

#: (logits [V], ids of the context and the answer so far) -> the next token
Chooser = Callable[[Tensor, Sequence[int]], int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn.

    top_k: among the k likeliest, 0 for all. top_p: among the likeliest of this total probability. min_p: among those at
    least this likely, as a share of the likeliest one's probability. repetition_penalty: above 1, tokens that stand in
    the conversation already become less likely. They mean what they mean in transformers' `generate`, in its order.
    Raises UsageError for numbers that cannot be.
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


def chooser(sampling: Sampling, device: torch.device) -> Chooser:
    """What picks the next token; one that draws goes on with its random numbers from call to call."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    drawn = sampling.temperature > 0
    if drawn:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(sampling.min_p))
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def choose(logits: Tensor, ids: Sequence[int]) -> int:
        if not processors:
            return int(logits.argmax())
        # The penalty alone looks at the tokens, and it looks at which there are, not at how often.
        seen = torch.tensor([sorted(set(ids))], dtype=torch.long, device=device)
        scores = processors(cast(LongTensor, seen), cast(FloatTensor, logits.float()[None]))[0]
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator) if drawn else scores.argmax())

    return choose


@dataclass(frozen=True, kw_only=True)
class EndOfTurn:
    """Where an answer ends: with `ids`, the end of turn that the template writes, or at a token of `stop`.

    ids: may be several tokens, or none where the template writes nothing after an answer.
    """

    ids: tuple[int, ...]
    stop: frozenset[int]

    def stops(self, token: int) -> bool:
        """Whether a token ends the answer without being a part of it."""
        return token in self.stop and token not in self.ids

    def complete(self, answer: Sequence[int]) -> bool:
        return bool(self.ids) and tuple(answer[-len(self.ids) :]) == self.ids

    def missing(self, answer: Sequence[int]) -> list[int]:
        """What an answer lacks of its end of turn."""
        return list(self.ids[self._overlap(answer) :])

    def content(self, answer: Sequence[int]) -> list[int]:
        """An answer without its end of turn, as far as that has come."""
        return list(answer[: len(answer) - self._overlap(answer)])

    def _overlap(self, answer: Sequence[int]) -> int:
        """How many tokens at the end of `answer` begin the end of turn."""
        for length in range(min(len(answer), len(self.ids)), 0, -1):
            if tuple(answer[-length:]) == self.ids[:length]:
                return length
        return 0


def message_text(text: str, lead: str) -> str:
    """What an answer says: its text without `lead`, which the template writes again when it renders the message."""
    return text.removeprefix(lead)


def can_show(text: str, lead: str) -> bool:
    """Whether the text of an answer so far may be shown: its last character is whole, and it is not all lead."""
    return not text.endswith(_INCOMPLETE) and not (lead and lead.startswith(text))
