"""The options of pack."""

from __future__ import annotations

from dataclasses import dataclass

from ismdata.choices import History, OverLong, TrainOn


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What decides the documents. `prefix_every`: under `prefix`, a document for every N-th answer only."""

    seq_len: int
    mask: str
    over_long: OverLong
    history: History
    prefix_every: int
    seed: int
    train_on: TrainOn = "all"

    @property
    def one_an_answer(self) -> bool:
        """Whether each trained answer gets a document of its own."""
        return self.mask == "prefix" or self.history == "expand"
