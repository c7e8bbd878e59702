"""The size of a session's context, and what happens when it is full."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ismdata.choices import WhenFull, check_choice
from ismdata.errors import UsageError
from ismdata.generate.model_facts import positions_of, steady_positions

#: The default factor of entropies after each turn, for `sirllm`.
DECAY = 0.9


@dataclass(frozen=True, kw_only=True)
class Window:
    """The size of a session's context, and what happens when it is full.

    Values of `when_full`:

    - `stop`: raise an error; the session does not change
    - `drop-oldest`: drop whole turns, the oldest first; keep the system prompt, and feed the rest again
    - `sirllm`: evict single tokens of the lowest entropy, but neither the first 4 nor the last turn
    - `streaming`, `random`, `interval`: evict single tokens by a baseline of SirLLM (`eviction.py`)

    Attributes:
        when_full: What to do when the context is full.
        context: Maximum number of entries in the cache; None for all of the model's positions.
        decay: Factor of all entropies after each turn, for `sirllm`.
        seed: Seed of `random`.

    Raises:
        UsageError: If a value is not allowed.
    """

    when_full: WhenFull = "stop"
    context: int | None = None
    decay: float = DECAY
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("--when-full", self.when_full, WhenFull)
        if self.context is not None and self.context < 1:
            raise UsageError(f"--context is {self.context}; expected 1 token or more")
        if not 0 <= self.decay <= 1:
            raise UsageError(f"decay is {self.decay}; expected 0 to 1")

    @property
    def policy(self) -> str | None:
        """The eviction policy; None if no single tokens are evicted."""
        return None if self.when_full in ("stop", "drop-oldest") else self.when_full


def context_size(model: PreTrainedModel, window: Window) -> int | None:
    """Maximum number of entries in the cache; None for no bound. Raises UsageError if it exceeds the positions."""
    positions, steady = positions_of(model), steady_positions(model)
    most = min((bound for bound in (positions, steady) if bound is not None), default=None)
    if window.context is None or most is None:
        return most if window.context is None else window.context
    if window.context <= most:
        return window.context
    if most == steady != positions:
        raise UsageError(
            f"--context is {window.context}; expected at most {steady}: beyond, {type(model).__name__} rotates all "
            "positions by other angles (longrope), and the cached keys of earlier turns would be wrong"
        )
    raise UsageError(f"--context is {window.context}; expected at most the model's {positions} positions")
