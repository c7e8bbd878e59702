"""The shards of a converted folder: writing them, with resuming after an interruption, and reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata import conversation
from ismdata.arrays import IntArray
from ismdata.conversation import CONVERSATION_SCHEMA
from ismdata.data.arrow_stream import map_sparsely, read_batches
from ismdata.data.index import ShardFile, describe_file, read_index
from ismdata.data.output_folder import reopen, sync_path

#: The most conversations, and about the most bytes of text, of a batch that ConvertedFolder yields.
_BATCH_CONVERSATIONS, _BATCH_BYTES = 4096, 8 << 20

#: A shard is closed when it has this many bytes.
SHARD_BYTES = 256 << 20

#: Ends an Arrow IPC stream: the continuation marker, and 0 as the length of the next message.
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ConversationWriter:
    """Writes conversations to `conversations-00000.arrow`, `conversations-00001.arrow` and so on.

    Args:
        folder: Where to write.
        state: What `state` returned when the interrupted run recorded it; rows written later are cut off. None starts
            with the first shard.

    Raises:
        DataError: If a file is shorter than `state` says.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"shards": [], "rows": 0, "bytes": 0, "length": 0}
        self.folder = folder
        self.shards = [ShardFile(**shard) for shard in state["shards"]]
        self._rows: int = state["rows"]
        self._bytes: int = state["bytes"]
        self._file = reopen(self._path(), state["length"]) if state["length"] else None

    @property
    def rows(self) -> int:
        """Conversations written so far."""
        return sum(shard.rows for shard in self.shards) + self._rows

    def write(self, rows: pa.Table) -> None:
        """Write rows of CONVERSATION_SCHEMA; each chunk becomes a record batch."""
        for batch in rows.to_batches():
            if not len(batch):
                continue
            if self._file is None:
                self._file = self._path().open("wb")
                self._file.write(CONVERSATION_SCHEMA.serialize())
            # Arrow's own writer cannot append to an existing stream, so its messages are written individually.
            self._file.write(batch.serialize())
            self._rows += len(batch)
            self._bytes += batch.nbytes
            if self._bytes >= SHARD_BYTES:
                self.close()

    def close(self) -> None:
        """Finish the open shard; rows written afterwards start another."""
        if self._file is not None:
            self._file.write(_END_OF_STREAM)
            self._file.close()
            sync_path(self._path())
            self.shards.append(describe_file(self._path(), self._rows))
            self._file, self._rows, self._bytes = None, 0, 0

    def state(self) -> dict[str, Any]:
        """What a later run needs to resume here, as JSON: valid once `files` are synced."""
        length = self._file.tell() if self._file is not None else 0
        shards = [asdict(shard) for shard in self.shards]
        return {"shards": shards, "rows": self._rows, "bytes": self._bytes, "length": length}

    def files(self) -> list[IO[bytes]]:
        """The files to sync before `state` is recorded; closed shards are synced already."""
        return [] if self._file is None else [self._file]

    def read_back(self) -> Iterator[pa.Table]:
        """Yield the rows of all closed shards, one record batch at a time."""
        for shard in self.shards:
            for _, batch in read_batches(self.folder, shard, CONVERSATION_SCHEMA):
                yield pa.Table.from_batches([batch])

    def _path(self) -> Path:
        return self.folder / f"conversations-{len(self.shards):05d}.arrow"


class ConvertedFolder:
    """Reads a converted folder: its conversations in batches, whose boundaries depend on the data alone.

    Files are checked for their size at the start, for their columns and rows while they are read.

    Args:
        folder: A folder that `ismdata convert` wrote.

    Raises:
        DataError: If it is none, or if a file is missing or has another size than its index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder, conversation.FORMAT)
        self.files = [ShardFile(**entry) for entry in self.index["shards"]]
        for file in self.files:
            file.check_size(self.folder)
        self.rows = sum(file.rows for file in self.files)

    @property
    def sha256(self) -> str:
        """SHA-256 of the shards' hashes, joined in their order."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    def batches(self, start: int = 0) -> Iterator[pa.RecordBatch]:
        """Yield the conversations from row `start` on, in batches of bounded size. Raises DataError."""
        for file in self.files:
            if start < file.rows:
                # Read, not mapped: mapped pages would stay in memory, up to the size of the file.
                for _, batch in read_batches(self.folder, file, CONVERSATION_SCHEMA, open_file=pa.OSFile):
                    for _, part in _split(batch):
                        if start < len(part):
                            yield part.slice(start)
                        start = max(0, start - len(part))
            else:
                start -= file.rows

    def batches_of(self, rows: IntArray) -> Iterator[pa.RecordBatch]:
        """Yield those of the batches that hold some of the rows numbered `rows`, int64[N]. Raises DataError.

        Of other batches little more than their metadata is read.
        """

        def wanted(first: int, count: int) -> bool:
            return bool(np.any((rows >= first) & (rows < first + count)))

        before = 0
        for file in self.files:
            if wanted(before, file.rows):
                for row, batch in read_batches(self.folder, file, CONVERSATION_SCHEMA, open_file=map_sparsely):
                    if wanted(before + row, len(batch)):
                        for at, part in _split(batch):
                            if wanted(before + row + at, len(part)):
                                yield part
            before += file.rows

    def texts(self) -> Iterator[str]:
        """Yield what messages say: contents, reasoning, and tool calls as JSON. Raises DataError as `batches` does."""
        for batch in self.batches():
            messages = batch.column("messages").flatten()
            for field in ("content", "reasoning_content", "tool_calls"):
                yield from messages.field(field).drop_null().to_pylist()

    def first(self, count: int) -> pa.RecordBatch | None:
        """The first conversations, at most `count`, or None if there are none. Raises DataError."""
        for file in self.files:
            for _, batch in read_batches(self.folder, file, CONVERSATION_SCHEMA, open_file=map_sparsely):
                return batch.slice(0, count)
        return None

    def table(self) -> pa.Table:
        """All conversations, memory-mapped. Raises DataError."""
        batches = (batch for file in self.files for _, batch in read_batches(self.folder, file, CONVERSATION_SCHEMA))
        return pa.Table.from_batches(batches, CONVERSATION_SCHEMA)


def _split(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Slices of bounded text, each with its first row in the batch. Where they are cut depends on the data alone."""
    messages = batch.column("messages")
    first = messages.offsets.to_numpy()
    contents = messages.values.field("content").cast(pa.large_string())
    ends = _string_offsets(contents)
    text_before = ends[first] - ends[first[0]]
    at = 0
    while at < len(batch):
        limit = int(np.searchsorted(text_before, text_before[at] + _BATCH_BYTES, side="right")) - 1
        end = min(max(limit, at + 1), at + _BATCH_CONVERSATIONS, len(batch))
        yield at, batch.slice(at, end - at)
        at = end


def _string_offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """Where each text starts and the last one ends in the array's data, in bytes: int64[len(texts) + 1]."""
    buffer = texts.buffers()[1]
    return np.frombuffer(buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
