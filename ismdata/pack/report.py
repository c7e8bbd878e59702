"""What a packing run counts, and the index that says it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ismdata.pack.documents import BatchResult
from ismdata.pack.planning.plan import lower_bound


@dataclass
class Tally:
    """Totals gathered on the way."""

    conversations: int = 0
    target_tokens: int = 0
    split: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    unwritten_reasoning: int = 0
    weighted: bool = False

    def add(self, made: BatchResult, *, conversations: int) -> None:
        self.conversations += conversations
        names = ("target_tokens", "split", "truncated", "truncated_tokens", "dropped", "unwritten_reasoning")
        for name in names:
            setattr(self, name, getattr(self, name) + getattr(made, name))

    def totals(self, lengths: NDArray[np.int32], seq_len: int, *, sequences: int) -> dict[str, int]:
        """What the index says: of documents of these lengths in so many sequences."""
        tokens = int(lengths.sum(dtype=np.int64))
        return {
            "conversations": self.conversations,
            "documents": len(lengths),
            "sequences": sequences,
            "tokens": tokens,
            "target_tokens": self.target_tokens,
            "padding_tokens": sequences * seq_len - tokens,
            "lower_bound_sequences": lower_bound(lengths, seq_len),
            "dropped": self.dropped,
            "split": self.split,
            "truncated": self.truncated,
            "truncated_tokens": self.truncated_tokens,
            "unwritten_reasoning": self.unwritten_reasoning,
        }
