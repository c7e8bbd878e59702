"""Sequences to the tensors of a batch. Intervals are not stored: they follow from the spans in a few vector operations.

Shape legend: B samples, T = seq_len.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
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

#: The label of a token that is no target, as torch.nn.functional.cross_entropy has it.


@dataclass(frozen=True)
class Collator:
    """Makes one batch of a list of samples: a `collate_fn` for DataLoader and for Hugging Face's Trainer.

    `mask` is the mask to train under; None takes the one that the shards were packed for. `ism` and `causal` share
    their packing, so either may be asked of the other's shards; `prefix` expands conversations when it packs and can
    be neither asked of other shards nor exchanged for another mask: UsageError.

    `tables` adds the index tables of the backend `varlen` (`masks/varlen_tables.py`), so that a DataLoader's worker
    makes them; without them the backend makes them itself, and waits for the device once a batch. Only that backend
    reads them and a batch should be no larger than it need be, so they are made when asked for.
    """

    mask: str | None = None
    tables: bool = False

    def __post_init__(self) -> None:
        if self.mask is not None:
            check_mask(self.mask)

    def __call__(self, samples: Several[Sample]) -> dict[str, Tensor]:
        """Tensors alone, by name:

        - `input_ids`, `position_ids`, `labels`: int64[B, T]; labels are unshifted, IGNORE_INDEX where not a target
        - `doc_start`, `kv_end`: int32[B, T]; row t sees the keys `[doc_start[t], kv_end[t])`
        - `block_table`: int16[B, T / 128, 4]; which blocks of keys a block of rows sees
        - `position_ids_2`: int64[B, T], in the GLM layout
        - `loss_weight`: float32[B, T], where the shards have weights
        - `varlen_documents`, `varlen_alone`, `varlen_rows`, `varlen_blocks`: int32, and `varlen_longest`, a shape
          without elements, where `tables` are asked for. They count over the B samples laid end to end. Of a batch
          that was cut the backend makes its own; where batches are joined on their way (accelerate's
          `dispatch_batches`), leave them out
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
                raise UsageError("a batch has samples in the GLM layout and plain ones. Batch each folder by itself")
            batch["position_ids_2"] = _widened(second)
        weights = [row.loss_weight for row in rows if row.loss_weight is not None]
        if weights:
            batch["loss_weight"] = np.stack(weights)
        if self.tables:
            batch |= varlen_tables.tables(doc_start, kv_end).as_batch()
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def check_serves(mask: str, *, packed_mask: str, place: str = "") -> None:
    """Raise UsageError when shards packed for `packed_mask` cannot serve `mask`. The message begins with `place`."""
    if mask == packed_mask or {mask, packed_mask} == {"ism", "causal"}:
        return
    raise UsageError(
        f"{place}{': ' if place else ''}"
        f"the shards were packed for the mask {packed_mask!r} and cannot serve {mask!r}: prefix has one document per "
        f"trained answer, the others one per conversation. Pack the corpus again with --mask {mask}"
    )


def _common_mask(samples: Several[Sample]) -> str:
    packed = {sample.mask for sample in samples}
    if len(packed) != 1:
        found = ", ".join(sorted(packed)) or "no sample"
        raise UsageError(f"a batch has samples packed for: {found}; expected one mask. Batch each folder by itself")
    return packed.pop()


def _widened(rows: list[NDArray[np.int32]]) -> NDArray[np.int64]:
    """The rows as int64[B, T], straight from the memory map: widened as they are copied."""
    wide = np.empty((len(rows), len(rows[0])), np.int64)
    for place, row in zip(wide, rows, strict=True):
        place[:] = row
    return wide


def _intervals(rows: list[shards.PackedSequence], mask: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """doc_start and kv_end, int32[B, T], of all rows at once."""
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
    return _offsets(doc_start, row_start), _offsets(kv_end, row_start)


def _offsets(ends: masks.OffsetArray, row_start: NDArray[np.int64]) -> NDArray[np.int32]:
    """What counts over rows laid end to end, [B * T], as offsets in each row, int32[B, T]. Changes `ends`."""
    rows = ends.reshape(len(row_start), -1)
    rows -= row_start.astype(rows.dtype)
    return rows.astype(np.int32, copy=False)
