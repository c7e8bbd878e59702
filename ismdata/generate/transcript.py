"""The state of a conversation: its messages, the tokens of generated answers, and what the model still sees of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ismdata.generate.feeding import Block, Encoder, conversation_blocks, next_blocks
from ismdata.rendering import Message


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A conversation. Methods return new transcripts.

    Attributes:
        messages: All messages.
        tools: The tools for the template.
        generated: Tokens of the answers that the model generated in this session, by index of the message.
        first: Index of the first message after the system prompt that the model sees. Those between are dropped from
            the context.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    generated: Mapping[int, list[int]] = field(default_factory=dict)
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", max(self.first, self.system_count))

    @property
    def system_count(self) -> int:
        """Number of system messages at the beginning."""
        return next((k for k, message in enumerate(self.messages) if message["role"] != "system"), len(self.messages))

    @property
    def answered(self) -> int:
        """Number of messages up to the last answer, including it."""
        return max((k for k, message in enumerate(self.messages, 1) if message["role"] == "assistant"), default=0)

    @property
    def turn_starts(self) -> list[int]:
        """Indices of the user messages that begin a turn. Tool results belong to the turn of the call."""
        return [
            k
            for k, message in enumerate(self.messages)
            if message["role"] == "user" and (k == self.system_count or self.messages[k - 1]["role"] == "assistant")
        ]

    def with_messages(self, messages: Sequence[Message]) -> Transcript:
        """The conversation with further messages."""
        return replace(self, messages=[*self.messages, *messages])

    def with_answer(self, text: str, ids: list[int]) -> Transcript:
        """The conversation with an answer that the model generated as `ids`, its end of turn included."""
        answered = self.with_messages([{"role": "assistant", "content": text}])
        return replace(answered, generated={**self.generated, len(self.messages): ids})

    def without_last_turn(self) -> Transcript:
        """The conversation without the last question or tool result and the answers to it."""
        end = len(self.messages)
        while end > self.system_count and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        while end > self.system_count and self.messages[end - 1]["role"] != "assistant":
            end -= 1
        generated = {index: ids for index, ids in self.generated.items() if index < end}
        # If nothing that the model sees is left, the dropped messages come back.
        first = self.first if self.first < end else 0
        return replace(self, messages=self.messages[:end], generated=generated, first=first)

    def blocks(self, encoder: Encoder, *, fed: int = 0) -> list[Block]:
        """Encode what to feed before the next answer.

        Args:
            encoder: The encoder.
            fed: Number of messages that were fed already, the last of which is an answer; 0 if none.

        Returns:
            The blocks, with message indices that count all messages.

        Raises:
            DataError: If the template does not accept the conversation.
        """
        dropped = self.first - self.system_count
        kept = [*self.messages[: self.system_count], *self.messages[self.first :]]
        if fed and fed == self.answered:
            return next_blocks(encoder, kept, self.tools, self.answered)
        generated = {index - dropped: ids for index, ids in self.generated.items() if index >= self.first}
        blocks = conversation_blocks(encoder, kept, self.tools, generated)
        blocks = [Block(ids, message + dropped if message >= 0 else message) for ids, message in blocks]
        done = next((count for count, block in enumerate(blocks, 1) if fed and block.message == fed - 1), 0)
        return blocks[done:]
