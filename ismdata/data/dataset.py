"""A packed folder as a map-style PyTorch dataset: memory-mapped, with random access, for DataLoader workers too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from ismdata.data.shards import PackedSequence, PackedShards


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence, and the mask that its folder was packed for, from which the Collator derives its mask."""

    sequence: PackedSequence
    mask: str

    def __repr__(self) -> str:
        return f"Sample(mask={self.mask!r}, sequence={self.sequence!r})"


class PackedDataset(Dataset[Sample]):
    """The sequences of a packed folder. Rows are read from memory-mapped files, which each worker process maps itself.

    Args:
        folder: A folder that `ismdata pack` wrote.

    Raises:
        DataError: If the folder is not a packed one, or a shard is missing or has another size than its index says.

    Example:
        >>> loader = DataLoader(PackedDataset("packed"), batch_size=4, collate_fn=Collator())  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.shards = PackedShards(folder)

    def __repr__(self) -> str:
        layout = "" if self.layout == "plain" else f", layout {self.layout}"
        folder = str(self.shards.folder)
        return (
            f"PackedDataset({folder!r}: {len(self):,} sequences of {self.seq_len:,} tokens, mask {self.mask}{layout})"
        )

    @property
    def mask(self) -> str:
        """The mask that the folder was packed for."""
        return self.shards.mask

    @property
    def layout(self) -> str:
        """`plain`, or `glm`: [MASK] and [START] before answers, two positions per token (Figure 2 b)."""
        return self.shards.layout

    @property
    def seq_len(self) -> int:
        """Tokens per sequence, padding included."""
        return self.shards.seq_len

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, row: int) -> Sample:
        """The sequence of a row as numpy views. Raises IndexError if there is no such row."""
        return Sample(sequence=self.shards[row], mask=self.mask)
