"""Packed shards: their Arrow schema, and reading their rows without copying.

A shard is an Arrow IPC stream with one row per sequence. `pack` writes shards; `verification.py` checks them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.data.arrow_stream import read_batches
from ismdata.data.index import ShardFile, read_index
from ismdata.errors import DataError, shown
from ismdata.masks import BLOCK_SIZE, END, KIND, START, TRAIN

#: Format identifier of a packed folder's `index.json`.
FORMAT = "ismdata.packed/1"

#: Conversations that the repr of a sequence names.
_NAMED = 3

SPAN_TYPE = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("train", pa.bool_(), nullable=False),
    ]
)


def packed_schema(seq_len: int, *, weighted: bool, layout: str = "plain") -> pa.Schema:
    """The columns of a shard.

    Args:
        seq_len: Tokens per sequence, a multiple of 128.
        weighted: Whether there is a column `loss_weight`.
        layout: `plain`, or `glm` with a column `position_ids_2`.

    Returns:
        The Arrow schema; no column is nullable.

    Example:
        >>> packed_schema(128, weighted=False).names[:3]
        ['input_ids', 'position_ids', 'loss_mask']
    """

    def fixed(value: pa.DataType, size: int) -> pa.DataType:
        return pa.list_(pa.field("item", value, nullable=False), size)

    def ragged(value: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("item", value, nullable=False))

    columns = [
        ("input_ids", fixed(pa.int32(), seq_len)),
        ("position_ids", fixed(pa.int32(), seq_len)),
        ("loss_mask", fixed(pa.uint8(), seq_len)),
        ("seq_lens", ragged(pa.int32())),
        ("spans", ragged(SPAN_TYPE)),
        ("block_table", fixed(pa.int16(), 4 * seq_len // BLOCK_SIZE)),
        ("conversation_ids", ragged(pa.string())),
    ]
    if layout == "glm":
        columns.insert(2, ("position_ids_2", fixed(pa.int32(), seq_len)))
    if weighted:
        columns.append(("loss_weight", fixed(pa.float32(), seq_len)))
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns])


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One packed row as numpy views into the memory map: T = seq_len, D documents, S spans."""

    input_ids: NDArray[np.int32]  # [T]
    position_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.uint8]  # [T]
    seq_lens: NDArray[np.int32]  # [D]
    spans: NDArray[np.int32]  # [S, 4]: start, end, kind, train
    block_table: NDArray[np.int16]  # [T / 128, 4]
    conversation_ids: list[str]  # [D]
    loss_weight: NDArray[np.float32] | None  # [T], if any message of the corpus has a weight
    position_ids_2: NDArray[np.int32] | None = None  # [T], in the GLM layout

    def __repr__(self) -> str:
        names = [shown(name) for name in self.conversation_ids[:_NAMED]]
        more = f", … {len(self.conversation_ids) - _NAMED} more" if len(self.conversation_ids) > _NAMED else ""
        return (
            f"PackedSequence({len(self.seq_lens)} documents [{', '.join(names)}{more}], "
            f"{int(self.seq_lens.sum()):,} of {len(self.input_ids):,} tokens, "
            f"{int(np.count_nonzero(self.loss_mask)):,} targets)"
        )


class _Batch:
    """A record batch as numpy views, so that reading a row only slices; ragged columns as values and offsets."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.rows = batch.num_rows
        self.fixed = {
            field.name: batch.column(field.name).flatten().to_numpy().reshape(self.rows, field.type.list_size)
            for field in batch.schema
            if pa.types.is_fixed_size_list(field.type)
        }
        lengths, spans, names = (batch.column(name) for name in ("seq_lens", "spans", "conversation_ids"))
        self.document_starts = lengths.offsets.to_numpy()
        self.seq_lens = lengths.values.to_numpy()
        self.span_starts = spans.offsets.to_numpy()
        self.spans = spans.values
        self.name_starts = names.offsets.to_numpy()
        self.names = names.values

    def row(self, at: int) -> PackedSequence:
        fixed = {name: values[at] for name, values in self.fixed.items()}
        names = self.names[self.name_starts[at] : self.name_starts[at + 1]]
        return PackedSequence(
            input_ids=fixed["input_ids"],
            position_ids=fixed["position_ids"],
            loss_mask=fixed["loss_mask"],
            seq_lens=self.seq_lens[self.document_starts[at] : self.document_starts[at + 1]],
            spans=span_matrix(self.spans[self.span_starts[at] : self.span_starts[at + 1]]),
            block_table=fixed["block_table"].reshape(-1, 4),
            conversation_ids=names.to_pylist(),
            loss_weight=fixed.get("loss_weight"),
            position_ids_2=fixed.get("position_ids_2"),
        )


class PackedShards:
    """Reads the rows of a packed folder: memory-mapped, with random access. Picklable; each process maps the files.

    Files are checked for their size, not for their SHA-256; `ismdata verify` does that.

    Args:
        folder: A folder that `ismdata pack` wrote.

    Raises:
        DataError: If the folder is not a packed one, or a shard is missing or has another size than its index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index: dict[str, Any] = read_index(self.folder, FORMAT)
        self.seq_len: int = self.index["seq_len"]
        self.mask: str = self.index["mask"]
        self.layout: str = self.index.get("layout", "plain")
        self.files = [ShardFile(**entry) for entry in self.index["shards"]]
        self.weighted = bool(self.index["weighted"])
        for file in self.files:
            file.check_size(self.folder)
        self._ends: list[int] = np.cumsum([file.rows for file in self.files]).tolist()
        self._tables: dict[int, pa.Table] = {}
        self._batches: dict[int, tuple[list[int], list[_Batch]]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}, "_batches": {}}

    def table(self, shard: int) -> pa.Table:
        """A shard by its number, as a memory-mapped table.

        Raises DataError if it is not a readable Arrow stream with the columns and rows that its index says.
        """
        if shard not in self._tables:
            schema = packed_schema(self.seq_len, weighted=self.weighted, layout=self.layout)
            batches = [batch for _, batch in read_batches(self.folder, self.files[shard], schema)]
            self._tables[shard] = pa.Table.from_batches(batches, schema)
        return self._tables[shard]

    def __getitem__(self, row: int) -> PackedSequence:
        """The sequence of a row; negative rows count from the end. Raises IndexError, or DataError as `table` does."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {self.folder}; expected 0 to {len(self) - 1}")
        row %= len(self)
        shard = bisect_right(self._ends, row)
        starts, batches = self._views(shard)
        at = row - (self._ends[shard] - self.files[shard].rows)
        number = bisect_right(starts, at) - 1
        return batches[number].row(at - starts[number])

    def _views(self, shard: int) -> tuple[list[int], list[_Batch]]:
        """The record batches of a shard, and the first row of each."""
        if shard not in self._batches:
            try:
                batches = [_Batch(batch) for batch in self.table(shard).to_batches()]
            except ValueError as error:  # Arrow's own errors are ValueErrors too
                path = self.folder / self.files[shard].name
                raise DataError(
                    f"{path}: null; expected a value everywhere ({error}). Make the folder again"
                ) from error
            ends = np.cumsum([batch.rows for batch in batches]).tolist()
            self._batches[shard] = ([end - batch.rows for end, batch in zip(ends, batches, strict=True)], batches)
        return self._batches[shard]


def span_matrix(spans: pa.StructArray) -> NDArray[np.int32]:
    """A struct array of S spans as int32[S, 4]: start, end, kind, train."""
    matrix = np.empty((len(spans), 4), np.int32)
    for column, name in ((START, "start"), (END, "end"), (KIND, "kind")):
        matrix[:, column] = spans.field(name).to_numpy()
    matrix[:, TRAIN] = spans.field("train").to_numpy(zero_copy_only=False)
    return matrix
