"""A conversation as a session holds it: its messages, the tokens of the answers that the model wrote, and what of it
the model still sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ismdata.generate.feeding import Block, Encoder, conversation_blocks, refusals_explained
from ismdata.rendering import Message


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """messages: all that was said. tools: what the template is told of tools. written: the tokens of the answers that
    the model wrote in this session, by number of the message. first: the first message behind the system prompt that
    the model sees; those between are left out.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    written: Mapping[int, list[int]] = field(default_factory=dict)
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", max(self.first, self.head))

    @property
    def head(self) -> int:
        """How many system messages the conversation begins with."""
        return _head(self.messages)

    @property
    def answered(self) -> int:
        """How many messages there are through the last answer."""
        return max((k for k, message in enumerate(self.messages, 1) if message["role"] == "assistant"), default=0)

    @property
    def turns(self) -> list[int]:
        """Where a user begins to speak: after the head, and after each answer. Results of tools belong to the turn."""
        return [
            k
            for k, message in enumerate(self.messages)
            if message["role"] == "user" and (k == self.head or self.messages[k - 1]["role"] == "assistant")
        ]

    def with_messages(self, messages: Sequence[Message]) -> Transcript:
        return replace(self, messages=[*self.messages, *messages])

    def with_answer(self, text: str, ids: list[int]) -> Transcript:
        """The conversation with an answer that the model wrote as `ids`, its end of turn included."""
        answered = self.with_messages([{"role": "assistant", "content": text}])
        return replace(answered, written={**self.written, len(self.messages): ids})

    def undone(self) -> Transcript:
        """The conversation before the last question, or result of a tool, and the answers to it."""
        at = len(self.messages)
        while at > self.head and self.messages[at - 1]["role"] == "assistant":
            at -= 1
        while at > self.head and self.messages[at - 1]["role"] != "assistant":
            at -= 1
        written = {place: ids for place, ids in self.written.items() if place < at}
        # Where nothing is left of what the model sees, it sees again what it no longer saw.
        return replace(self, messages=self.messages[:at], written=written, first=self.first if self.first < at else 0)

    def blocks(self, encoder: Encoder, *, fed: int = 0) -> list[Block]:
        """What to feed before the model answers, the first `fed` messages, the last of which is an answer, having been
        fed. Raises DataError where the template does not take the conversation.
        """
        moved = self.first - self.head
        kept = [*self.messages[: self.head], *self.messages[self.first :]]
        if fed and fed == self.answered:
            with refusals_explained():
                end = encoder.turn_end(kept, self.tools)
                ended = [Block(end, self.answered - 1)] if end else []
                return [*ended, Block(encoder.next_context(kept, self.tools))]
        written = {place - moved: ids for place, ids in self.written.items() if place >= self.first}
        blocks = conversation_blocks(encoder, kept, self.tools, written)
        blocks = [Block(ids, message + moved if message >= 0 else message) for ids, message in blocks]
        done = next((place for place, block in enumerate(blocks, 1) if fed and block.message == fed - 1), 0)
        return blocks[done:]


def _head(messages: Sequence[Mapping[str, Any]]) -> int:
    return next((k for k, message in enumerate(messages) if message["role"] != "system"), len(messages))
