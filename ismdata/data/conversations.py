"""The files of a converted folder while they are written: shards of conversations, and the quarantine.

Both are written end to end and can go on where an interrupted run was: `state` says how far that is, once `files` are
on the disk.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata import conversation
from ismdata.arrays import IntArray
from ismdata.conversation import CONVERSATION_SCHEMA, Quarantined
from ismdata.data.index import ShardFile, describe_file, read_index
from ismdata.data.output_folder import QUARANTINE_NAME, sync_path
from ismdata.errors import DataError, shown

#: Conversations and bytes of text that are tokenised at a time.
_BATCH_CONVERSATIONS = 4096

_BATCH_BYTES = 8 << 20


#: A shard is closed once it holds this much.
SHARD_BYTES = 256 << 20
#: Ends an Arrow IPC stream: the mark of a message and a length of none.
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ConversationWriter:
    """Conversations in, `conversations-00000.arrow …` out. `state` is what an earlier writer left."""

    def __init__(self, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"shards": [], "rows": 0, "bytes": 0, "length": 0}
        self.folder = folder
        self.shards = [ShardFile(**shard) for shard in state["shards"]]
        self._rows: int = state["rows"]
        self._bytes: int = state["bytes"]
        self._file = resumed(self._path(), state["length"]) if state["length"] else None

    @property
    def rows(self) -> int:
        """Conversations written so far."""
        return sum(shard.rows for shard in self.shards) + self._rows

    def write(self, rows: pa.Table) -> None:
        """Add rows of CONVERSATION_SCHEMA; each chunk becomes a record batch."""
        for batch in rows.to_batches():
            if not len(batch):
                continue
            if self._file is None:
                self._file = self._path().open("wb")
                self._file.write(CONVERSATION_SCHEMA.serialize())
            # Message by message, so that a stream can be gone on with: Arrow's own writer only begins them.
            self._file.write(batch.serialize())
            self._rows += len(batch)
            self._bytes += batch.nbytes
            if self._bytes >= SHARD_BYTES:
                self.close()

    def close(self) -> None:
        """Close the shard that is open; more rows open another."""
        if self._file is not None:
            self._file.write(_END_OF_STREAM)
            self._file.close()
            sync_path(self._path())
            self.shards.append(describe_file(self._path(), self._rows))
            self._file, self._rows, self._bytes = None, 0, 0

    def state(self) -> dict[str, Any]:
        """What a later writer needs to go on from here."""
        length = self._file.tell() if self._file is not None else 0
        shards = [asdict(shard) for shard in self.shards]
        return {"shards": shards, "rows": self._rows, "bytes": self._bytes, "length": length}

    def files(self) -> list[IO[bytes]]:
        """What must reach the disk for `state` to hold; shards that are closed have done so."""
        return [] if self._file is None else [self._file]

    def read_back(self) -> Iterator[pa.Table]:
        """The rows of all closed shards, a batch at a time."""
        for shard in self.shards:
            with pa.memory_map(str(self.folder / shard.name)) as mapped, pa.ipc.open_stream(mapped) as batches:
                yield from (pa.Table.from_batches([batch]) for batch in batches)

    def _path(self) -> Path:
        return self.folder / f"conversations-{len(self.shards):05d}.arrow"


class QuarantineWriter:
    """Refused records in, `quarantine.jsonl` out, counted by reason. `first` is a refusal of each reason."""

    def __init__(self, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"reasons": {}, "first": [], "length": 0}
        self.reasons = Counter[str](state["reasons"])
        self.first = {entry["reason"]: Quarantined(**entry, record=None) for entry in state["first"]}
        self._file = resumed(folder / QUARANTINE_NAME, state["length"])

    def add(self, refused: Sequence[Quarantined]) -> None:
        for one in refused:
            self.reasons[one.reason] += 1
            self.first.setdefault(one.reason, one)
            self._file.write(quarantine_line(one))

    def close(self) -> None:
        self._file.close()

    def state(self) -> dict[str, Any]:
        """What a later writer needs to go on from here; of the first refusals all but the records."""
        first = [{"source": one.source, "reason": one.reason, "detail": one.detail} for one in self.first.values()]
        return {"reasons": dict(self.reasons), "first": first, "length": self._file.tell()}

    def files(self) -> list[IO[bytes]]:
        return [self._file]


def resumed(path: Path, length: int) -> IO[bytes]:
    """A file to go on with after its first `length` bytes. Raises DataError where it has fewer."""
    file = path.open("r+b" if length else "wb")
    found = file.seek(0, 2)
    if found < length:
        file.close()
        raise DataError(
            f"{path}: {found} bytes; expected at least {length}, which the interrupted run had written. "
            "It was changed since; what is left is removed: run the same command again"
        )
    file.truncate(length)
    file.seek(length)
    return file


def quarantine_line(refused: Quarantined) -> bytes:
    """One line of `quarantine.jsonl`; what UTF-8 cannot hold is escaped, what JSON cannot hold is text."""
    line = refused.as_json()
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line, allow_nan=False).encode("ascii") + b"\n"
    except (ValueError, RecursionError):
        return json.dumps({**line, "record": shown(refused.record)}).encode("ascii") + b"\n"


class ConvertedFolder:
    """A converted folder, opened and checked by size. Raises DataError."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder, conversation.FORMAT)
        self.files = [ShardFile(**entry) for entry in self.index["shards"]]
        for file in self.files:
            file.check_size(self.folder)
        self.rows = sum(file.rows for file in self.files)

    @property
    def sha256(self) -> str:
        """Of the hashes of its shards, in order."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The conversations in batches that are small enough to work on."""
        for file in self.files:
            # Not mapped: pages that have been read would be kept, up to all of the file.
            with self._stream(file, lambda path: pa.OSFile(str(path))) as stream:
                for batch in stream:
                    yield from _small(batch)

    def batches_of(self, rows: IntArray) -> Iterator[pa.RecordBatch]:
        """Those of the same batches that hold some of these rows. Of the others little more than a heading is read."""
        done = 0
        for file in self.files:
            if np.any((rows >= done) & (rows < done + file.rows)):
                with self._stream(file, _mapped) as stream:
                    for first, batch in _holding(rows, stream, done):
                        for _, small in _holding(rows, _small(batch), first):
                            yield small
            done += file.rows

    def first(self, count: int) -> pa.RecordBatch | None:
        """The first conversations, at most `count`; None where there are none. Little more than these is read."""
        for file in self.files:
            with self._stream(file, _mapped) as stream:
                for batch in stream:
                    return batch.slice(0, count)
        return None

    @contextmanager
    def _stream(self, file: ShardFile, opened: Callable[[Path], Any]) -> Iterator[pa.RecordBatchReader]:
        """The record batches of a file. Raises DataError where it holds something else."""
        path = self.folder / file.name
        try:
            with opened(path) as source, pa.ipc.open_stream(source) as stream:
                if not stream.schema.equals(conversation.CONVERSATION_SCHEMA):
                    raise DataError(f"{path}: not the columns of converted conversations. Convert the corpus again")
                yield stream
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a readable Arrow stream ({error}). Convert the corpus again") from error


def _mapped(path: Path) -> pa.BufferReader:
    """A file of which no more is read than is looked at."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    return pa.BufferReader(pa.py_buffer(mapped))


def _holding(rows: IntArray, batches: Iterable[pa.RecordBatch], first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches that hold some of the rows, and the number of each one's first row; `first` is that of them all."""
    for batch in batches:
        if np.any((rows >= first) & (rows < first + len(batch))):
            yield first, batch
        first += len(batch)


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A record batch in slices of bounded text. Where they are cut depends on the data alone."""
    messages = batch.column("messages")
    first = messages.offsets.to_numpy()
    contents = messages.values.field("content").cast(pa.large_string())
    ends = contents.offsets.to_numpy() if hasattr(contents, "offsets") else _string_offsets(contents)
    text_before = ends[first] - ends[first[0]]
    at = 0
    while at < len(batch):
        limit = int(np.searchsorted(text_before, text_before[at] + _BATCH_BYTES, side="right")) - 1
        end = min(max(limit, at + 1), at + _BATCH_CONVERSATIONS, len(batch))
        yield batch.slice(at, end - at)
        at = end


def _string_offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    buffer = texts.buffers()[1]
    return np.frombuffer(buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
