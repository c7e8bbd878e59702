"""Collate packed sequences into the tensors of a batch.

Shards do not store the intervals of keys that tokens see: they are computed from the spans, vectorised over the batch.

Shape legend: B samples, T = seq_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ismdata import masks
from ismdata.choices import check_mask
from ismdata.data import shards
from ismdata.data.dataset import Sample
from ismdata.errors import UsageError
from ismdata.masks import IGNORE_INDEX, varlen_tables


@dataclass(frozen=True)
class Collator:
    """A `collate_fn` for DataLoader and for Hugging Face's Trainer.

    Args:
        mask: The mask to train under; None takes the one that the shards were packed for. Shards packed for `ism` or
            `causal` serve both. Shards packed for `prefix` serve `prefix` alone, and no others do.
        tables: Whether to add the index tables of the attention backend `varlen`, so that DataLoader workers compute
            them. Without them that backend computes them itself and waits for the device once per batch; other
            backends do not use them.

    Raises:
        UsageError: If the mask is unknown. Calling a Collator raises it if samples cannot be batched or do not serve
            the mask.

    Example:
        >>> DataLoader(PackedDataset("packed"), batch_size=4, collate_fn=Collator(mask="ism"))  # doctest: +SKIP
    """

    mask: str | None = None
    tables: bool = False

    def __post_init__(self) -> None:
        if self.mask is not None:
            check_mask(self.mask)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate B samples that are packed for the same mask and layout.

        Returns:
            Tensors by name:

            - `input_ids`, `position_ids`, `labels`: int64[B, T]; labels are unshifted, IGNORE_INDEX outside targets
            - `doc_start`, `kv_end`: int32[B, T]; token t sees the keys `[doc_start[t], kv_end[t])`
            - `block_table`: int16[B, T / 128, 4]; the blocks of keys that each block of tokens sees
            - `position_ids_2`: int64[B, T], in the GLM layout
            - `loss_weight`: float32[B, T], if the shards have weights
            - `varlen_documents`, `varlen_alone`, `varlen_rows`, `varlen_blocks`: int32, and `varlen_longest`, a tensor
              without elements whose shape is the value: with `tables`. They index the B samples laid end to end. If
              a batch is sliced, the backend computes new ones; if batches are concatenated later (accelerate's
              `dispatch_batches`), turn `tables` off
        """
        packed_mask = _common_mask(samples)
        mask = packed_mask if self.mask is None else self.mask
        check_serves(mask, packed_mask=packed_mask)
        rows = [sample.sequence for sample in samples]

        input_ids = _widened([row.input_ids for row in rows])
        is_target = np.stack([row.loss_mask for row in rows]).astype(bool, copy=False)
        doc_start, kv_end = _intervals(rows, mask)
        if mask == packed_mask:
            block_table = np.stack([row.block_table for row in rows])
        else:
            block_table = masks.block_table(doc_start, kv_end)
        batch = {
            "input_ids": input_ids,
            "position_ids": _widened([row.position_ids for row in rows]),
            "labels": np.where(is_target, input_ids, IGNORE_INDEX),
            "doc_start": doc_start,
            "kv_end": kv_end,
            "block_table": block_table,
        }
        second = [row.position_ids_2 for row in rows if row.position_ids_2 is not None]
        if second:
            if len(second) != len(rows):
                raise UsageError(
                    "a batch has samples in the GLM layout and others in the plain layout; expected one layout. "
                    "Batch each folder separately"
                )
            batch["position_ids_2"] = _widened(second)
        weights = [row.loss_weight for row in rows if row.loss_weight is not None]
        if weights:
            batch["loss_weight"] = np.stack(weights)
        if self.tables:
            batch |= varlen_tables.tables(doc_start, kv_end).as_batch()
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def check_serves(mask: str, *, packed_mask: str, place: str = "") -> None:
    """Check that shards packed for one mask serve training or evaluation under another.

    Args:
        mask: The wanted mask.
        packed_mask: The mask that the shards were packed for.
        place: The folder or option that the message starts with.

    Raises:
        UsageError: If they do not.

    Example:
        >>> check_serves("causal", packed_mask="ism")
    """
    if mask == packed_mask or {mask, packed_mask} == {"ism", "causal"}:
        return
    raise UsageError(
        f"{place}{': ' if place else ''}"
        f"the shards were packed for the mask {packed_mask!r} and cannot serve {mask!r}: prefix has a document per "
        f"trained answer, ism and causal have one per conversation. Pack the corpus again with --mask {mask}"
    )


def _common_mask(samples: Sequence[Sample]) -> str:
    packed = {sample.mask for sample in samples}
    if len(packed) != 1:
        found = ", ".join(sorted(packed)) or "no sample"
        raise UsageError(f"a batch has samples packed for {found}; expected one mask. Batch each folder separately")
    return packed.pop()


def _widened(rows: list[NDArray[np.int32]]) -> NDArray[np.int64]:
    """The rows as int64[B, T], converted while they are copied out of the memory map."""
    wide = np.empty((len(rows), len(rows[0])), np.int64)
    for target, row in zip(wide, rows, strict=True):
        target[:] = row
    return wide


def _intervals(rows: list[shards.PackedSequence], mask: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """doc_start and kv_end of all rows, int32[B, T] each."""
    seq_len = len(rows[0].input_ids)
    tiling = masks.tile(
        [len(row.seq_lens) for row in rows],
        np.concatenate([row.seq_lens for row in rows]),
        [len(row.spans) for row in rows],
        np.concatenate([row.spans for row in rows]),
        seq_len=seq_len,
    )
    row_start = np.arange(0, len(rows) * seq_len, seq_len)[:, None]
    doc_start, kv_end = masks.tiled_intervals(tiling, mask=mask)
    return _in_rows(doc_start, row_start), _in_rows(kv_end, row_start)


def _in_rows(offsets: masks.OffsetArray, row_start: NDArray[np.int64]) -> NDArray[np.int32]:
    """Offsets into rows laid end to end, [B * T], as offsets into each row, int32[B, T]. Changes `offsets`."""
    rows = offsets.reshape(len(row_start), -1)
    rows -= row_start.astype(rows.dtype)
    return rows.astype(np.int32, copy=False)
