"""The KV cache of a session: keys and values, the tokens behind them, and eviction when the cache is full.

Each entry of the cache belongs to one token that went through the model. With an eviction policy (`eviction.py`) the
cache also stores each token's entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ismdata.attention import takes_two_positions
from ismdata.generate.eviction import SINKS, KeyRotation, crop_entries, keep_entries, select_entries
from ismdata.generate.feeding import feed, feed_scored
from ismdata.generate.whole_cache import whole_cache
from ismdata.masks import token_positions

#: At least 1/16 of the cache is evicted at a time, so that keys are not rotated again for each generated token.
_STRIDE = 16


class KVCache:
    """A KV cache that grows block by block under a mask.

    Attributes:
        ids: The tokens of the entries, in order.
        entropies: The entropies of the entries, with a policy only: -log p in nats, times `decay` for each turn since.
        cache: The keys and values.
        evictions: How often entries were evicted. Cropping cannot restore evicted entries.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mask: str,
        size: int | None,
        policy: str | None = None,
        decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Make an empty cache.

        Args:
            model: An attached model in evaluation mode.
            mask: The mask to run the model under.
            size: Maximum number of entries; None for no bound.
            policy: Which entries stay when the cache is full, a key of `eviction.POLICIES`. None: no entry is evicted,
                and the caller appends no more than `size`.
            decay: Factor of all entropies at the end of each turn.
            seed: Seed of the policy `random`.

        Raises:
            UnsupportedModelError: If the model's cache holds more than keys and values, or if there is a policy and
                the model's keys cannot be rotated.
        """
        self.model = model
        self.mask = mask
        self.size = size
        self.policy = policy
        self.decay = decay
        self._rotation = None if policy is None else KeyRotation.of(model)
        self._two_positions = takes_two_positions(model)
        self._generator = np.random.default_rng(seed)
        self.evictions = 0
        self.clear()

    def clear(self) -> None:
        """Remove all entries."""
        self.ids: list[int] = []
        self.entropies: list[float] = []
        self.cache = whole_cache(self.model)
        self._logits: Tensor | None = None
        self._turn_start = 0
        #: In the GLM layout: the index of the current answer's first entry; None inside a context.
        self._answer_start: int | None = None

    def crop(self, length: int) -> None:
        """Keep the first `length` entries. No entry may have been evicted since the cache had that length."""
        if length == 0:
            self.clear()
            return
        crop_entries(self.cache, length)
        del self.ids[length:], self.entropies[length:]
        # The logits that would score the next token are gone with the last entry, so its entropy will be 0.
        self._logits = None
        self._turn_start = min(self._turn_start, length)
        self._answer_start = None

    def append(self, ids: Sequence[int], *, is_answer: bool, opening: Sequence[int] = ()) -> Tensor:
        """Run a block, or a part of an answer, through the model and append its entries.

        Args:
            ids: The tokens.
            is_answer: Whether they belong to an answer, which is causal under every mask.
            opening: In the GLM layout, the tokens that open the answer after this context (`[START]`). Under `prefix`
                they are part of the context, and its tokens see them.

        Returns:
            The logits of the last token, [V].
        """
        if self.policy is not None and is_answer and self.size is not None and len(self.ids) + len(ids) > self.size:
            # One token at a time, as in generation, so that the same entries are evicted when an answer is fed again.
            for id in ids:
                logits = self._append([id], is_answer=True)
            return logits
        in_context = list(opening) if self.mask == "prefix" else []
        logits = self._append([*ids, *in_context], is_answer=is_answer, opening=len(in_context))
        return logits if in_context or not opening else self._append(opening, is_answer=True)

    def _append(self, ids: Sequence[int], *, is_answer: bool, opening: int = 0) -> Tensor:
        bidirectional = self.mask != "causal" and not is_answer
        if self.policy is None:
            positions = self._positions(len(ids), is_answer, opening)
            logits = feed(self.model, ids, self.cache, bidirectional=bidirectional, positions=positions)
        else:
            self._evict(len(ids))
            if not is_answer:
                self._turn_start = len(self.ids)
            logits, entropies = feed_scored(self.model, ids, self.cache, self._logits)
            if bidirectional:  # a token of the block sees its successor, so only a causal pass can score it
                crop_entries(self.cache, len(self.ids))
                logits = feed(self.model, ids, self.cache, bidirectional=True)
            self.entropies += entropies
        self.ids += ids
        self._logits = logits
        return logits

    def _positions(self, count: int, is_answer: bool, opening: int) -> tuple[list[int], list[int]] | None:
        """Position 1 and position 2 of the next `count` tokens, the last `opening` of which open an answer.

        None for a model with one position, which continues from the cache.
        """
        if not self._two_positions:
            return None
        past = len(self.ids)
        if not is_answer:
            self._answer_start = None
        elif self._answer_start is None:
            self._answer_start = past
        first, second = token_positions(past, count - opening, start=self._answer_start)
        if opening:
            self._answer_start = past + count - opening
            opening_first, opening_second = token_positions(self._answer_start, opening, start=self._answer_start)
            first, second = first + opening_first, second + opening_second
        return first, second

    def end_turn(self) -> None:
        """Multiply the entropies of all entries by `decay`."""
        self.entropies = [entropy * self.decay for entropy in self.entropies]

    def _evict(self, needed: int) -> None:
        """Evict entries until `needed` more fit. The sinks and the last turn stay as far as possible."""
        entries = len(self.ids)
        if self.size is None or self.policy is None or self._rotation is None or entries + needed <= self.size:
            return
        recent = entries - self._turn_start
        count = self.size - needed
        count = min(count, max(self.size - max(needed, self.size // _STRIDE), min(SINKS + recent, count)))
        entropies = np.array(self.entropies)
        kept = select_entries(self.policy, entropies, count, recent=recent, generator=self._generator)
        keep_entries(self.cache, kept, self._rotation)
        self.ids = [self.ids[index] for index in kept]
        self.entropies = [self.entropies[index] for index in kept]
        self._turn_start = max(len(kept) - recent, 0)
        self.evictions += 1
