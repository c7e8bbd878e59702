"""The files of a converted folder while they are written: shards of conversations, and the quarantine.

Both are written end to end and can go on where an interrupted run was: `state` says how far that is, once `files` are
on the disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ismdata.conversation import CONVERSATION_SCHEMA, Quarantined
from ismdata.convert.formats.base import shown
from ismdata.data.output_folder import QUARANTINE_NAME, ShardFile, describe_file, sync_path
from ismdata.errors import DataError

#: A shard is closed once it holds this much.
SHARD_BYTES = 256 << 20
#: Ends an Arrow IPC stream: the mark of a message and a length of none.
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ShardWriter:
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
