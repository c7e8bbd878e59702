"""Reading the shards of converted and packed folders: Arrow IPC streams of a known schema."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from ismdata.data.index import INDEX_NAME, ShardFile
from ismdata.errors import DataError

#: Opens a file as Arrow reads it; `pa.memory_map` and `pa.OSFile` are two of them.
FileOpener = Callable[[str], pa.NativeFile]


def read_batches(
    folder: Path,
    file: ShardFile,
    schema: pa.Schema,
    *,
    open_file: FileOpener = pa.memory_map,
    validate: bool = False,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the record batches of a shard, each with the number of its first row in the shard.

    Args:
        folder: The folder of the shard.
        file: The shard as `index.json` lists it.
        schema: The columns that it must have.
        open_file: How to open it: memory-mapped, or read into memory.
        validate: Whether to check every value of every batch, such as UTF-8 and offsets.

    Raises:
        DataError: If the shard is not a readable Arrow stream, or has other columns or another number of rows.
    """
    path, row = folder / file.name, 0
    try:
        with open_file(str(path)) as source, pa.ipc.open_stream(source) as stream:
            if not stream.schema.equals(schema):
                raise DataError(
                    f"{path}: columns are {_describe(stream.schema)}; expected {_describe(schema)}. "
                    "Make the folder again"
                )
            for batch in stream:
                if validate:
                    batch.validate(full=True)
                yield row, batch
                row += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        place = f" after row {row - 1}" if row else ""
        raise DataError(f"{path}: not a readable Arrow stream{place} ({error}). Make the folder again") from error
    if row != file.rows:
        raise DataError(f"{path}: {row} rows; expected {file.rows} ({INDEX_NAME}). Make the folder again")


def map_sparsely(path: str) -> pa.BufferReader:
    """Map a file into memory without reading ahead, for readers that look at a small part of it."""
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    return pa.BufferReader(pa.py_buffer(mapped))


def _describe(schema: pa.Schema) -> str:
    """Names and types of the columns."""
    try:
        return ", ".join(f"{field.name} {field.type}{'' if field.nullable else ' not null'}" for field in schema)
    except UnicodeDecodeError:
        return "not named in UTF-8"
