"""What a session's cache holds: the tokens behind it, the cache itself, and how it stays within its size.

Each entry of the cache belongs to one token that went through the model. Where a policy is given (`eviction.py`),
every token's entropy is kept beside it, and entries leave when there is no room.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ismdata.attention import takes_two_positions
from ismdata.generate.eviction import SINKS, KeyRotation, compact, crop, kept
from ismdata.generate.feeding import feed, feed_scored
from ismdata.masks import token_positions

#: The share of the cache that leaves at once while an answer is written, so that keys are not turned at each token.
_STRIDE = 16


class KVCache:
    """Tokens that were fed under `mask`, and the keys and values that came of them.

    ids: the tokens behind the cache, one each entry. size: the most entries; None for no limit. policy: who stays when
    there is no room, a key of `cache_policy.POLICIES`; without it, what does not fit must not be fed. decay: what the
    entropies are multiplied by after each turn. Raises UnsupportedModelError where the model's keys cannot be turned.
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
        self.model = model
        self.mask = mask
        self.size = size
        self.policy = policy
        self.decay = decay
        self._rotation = None if policy is None else KeyRotation.of(model)
        self._two_positions = takes_two_positions(model)
        self._generator = np.random.default_rng(seed)
        #: How often entries left; what was cut out cannot come back by cropping.
        self.evictions = 0
        self.forget()

    def forget(self) -> None:
        """Hold nothing."""
        self.ids: list[int] = []
        self.entropies: list[float] = []
        self.cache = DynamicCache(config=self.model.config)
        self._logits: Tensor | None = None
        self._turn_start = 0
        #: In the GLM layout: where the answer that is being fed begins; None inside a context.
        self._answer_start: int | None = None

    def crop(self, length: int) -> None:
        """Hold the first `length` entries alone, none of which may have been fed after others left."""
        if length == 0:
            self.forget()
            return
        crop(self.cache, length)
        del self.ids[length:], self.entropies[length:]
        # The logits that scored the next token are gone with the last row: its entropy counts as 0.
        self._logits = None
        self._turn_start = min(self._turn_start, length)
        self._answer_start = None

    def feed(self, ids: Sequence[int], *, is_answer: bool, opening: Sequence[int] = ()) -> Tensor:
        """Feed a block, or a part of an answer, and return the last token's logits, [V].

        opening: in the GLM layout, what opens the answer that follows a context; under `prefix` it is a part of the
        context that the context's tokens see.
        """
        if self.policy is not None and is_answer and self.size is not None and len(self.ids) + len(ids) > self.size:
            # As if the model wrote it now: what leaves must not depend on whether an answer is fed for the first time.
            for id in ids:
                logits = self._feed([id], is_answer=True)
            return logits
        joined = list(opening) if self.mask == "prefix" else []
        logits = self._feed([*ids, *joined], is_answer=is_answer, opening=len(joined))
        return logits if joined or not opening else self._feed(opening, is_answer=True)

    def _feed(self, ids: Sequence[int], *, is_answer: bool, opening: int = 0) -> Tensor:
        bidirectional = self.mask != "causal" and not is_answer
        if self.policy is None:
            positions = self._positions(len(ids), is_answer, opening)
            logits = feed(self.model, ids, self.cache, bidirectional=bidirectional, positions=positions)
        else:
            self._make_room(len(ids))
            if not is_answer:
                self._turn_start = len(self.ids)
            logits, entropies = feed_scored(self.model, ids, self.cache, self._logits)
            if bidirectional:  # inside the block tokens see their successors: the causal pass was for the scores
                crop(self.cache, len(self.ids))
                logits = feed(self.model, ids, self.cache, bidirectional=True)
            self.entropies += entropies
        self.ids += ids
        self._logits = logits
        return logits

    def _positions(self, count: int, is_answer: bool, opening: int) -> tuple[list[int], list[int]] | None:
        """Both positions of tokens to feed, the last `opening` of which open an answer, for a model that has two; None
        for one that counts by itself.
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
            more, others = token_positions(self._answer_start, opening, start=self._answer_start)
            first, second = first + more, second + others
        return first, second

    def end_turn(self) -> None:
        """The entropies of all that came up to here fade."""
        self.entropies = [entropy * self.decay for entropy in self.entropies]

    def _make_room(self, needed: int) -> None:
        """Let entries leave until `needed` more fit. The sinks and the last turn stay as far as they can."""
        held = len(self.ids)
        if self.size is None or self.policy is None or self._rotation is None or held + needed <= self.size:
            return
        recent = held - self._turn_start
        count = self.size - needed
        count = min(count, max(self.size - max(needed, self.size // _STRIDE), min(SINKS + recent, count)))
        stay = kept(self.policy, np.array(self.entropies), count, recent=recent, generator=self._generator)
        compact(self.cache, stay, self._rotation)
        self.ids = [self.ids[at] for at in stay]
        self.entropies = [self.entropies[at] for at in stay]
        self._turn_start = max(len(stay) - recent, 0)
        self.evictions += 1
