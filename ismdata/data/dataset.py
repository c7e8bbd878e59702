"""A packed folder as a map-style PyTorch dataset: memory-mapped, random access, at home in DataLoader workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from ismdata.data.shards import PackedSequence, PackedShards


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence and the mask that its folder was packed for, which the Collator must know to build or refuse one."""

    sequence: PackedSequence
    mask: str


class PackedDataset(Dataset[Sample]):
    """The sequences of a folder that `ismdata pack` wrote.

    Rows stay in memory-mapped files until they are read, and a worker process maps them anew, whether it was forked or
    spawned. Raises DataError when the folder is not a packed one or a shard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.shards = PackedShards(folder)

    @property
    def mask(self) -> str:
        """The mask that the folder was packed for."""
        return self.shards.mask

    @property
    def layout(self) -> str:
        """`plain`, or `glm`: two tokens before answers and two positions (`rendering/glm_tokens.py`)."""
        return self.shards.layout

    @property
    def seq_len(self) -> int:
        """T: tokens in every sequence, padding included."""
        return self.shards.seq_len

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, row: int) -> Sample:
        """PackedSequence `row` as numpy views. Raises IndexError beyond the folder's sequences."""
        return Sample(sequence=self.shards[row], mask=self.mask)
