"""The record of a run in its unfinished output folder, with which the same command resumes after a crash.

`journal.jsonl` lies in the folder that is being written. Its first line identifies the run. Each further line is
appended after everything it refers to has been synced to the disk. A line that a crash cut off does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from ismdata.data.column_file import ColumnFile
from ismdata.data.output_folder import JOURNAL_NAME, sync_path
from ismdata.errors import DataError, UsageError

#: Version of the states that commands record. An interrupted run with another one cannot be resumed.
_STATE_VERSION = 3

#: Seconds between two records. If recording is slow the interval grows, so that it takes at most 1/20 of the time.
_EVERY = 1.0
_SHARE = 20

#: Files that are synced in parallel: several take a disk little longer than one.
_SYNC_THREADS = 8

#: A file that a record refers to.
RecordedFile = ColumnFile | IO[bytes] | Path


class Journal:
    """The record of one run: what it has written so far, and which run it is.

    Create it with `Journal.open` inside `open_output(leftovers=JournaledLeftovers())`, which removes the file when the
    folder is complete.

    Attributes:
        state: What was recorded last; None if nothing was.
        finished: The entries of all finished parts, in order.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None, finished: list[dict[str, Any]]) -> None:
        self.state, self.finished = state, finished
        self._path = path
        self._file = path.open("ab")
        self._listed: set[Path] = set()
        self._next: float | None = None

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Any], *, restart: bool) -> Journal:
        """Resume the run that `folder` holds, or empty the folder and start.

        Args:
            folder: The unfinished output folder.
            run: What identifies the run, as JSON: everything that its output depends on. `sources` and `others` list
                files as objects with a `name` and what identifies their content; `options` has the options by name.
            restart: Whether to start over if the folder holds another run.

        Returns:
            The journal, with the state of the interrupted run if there is one.

        Raises:
            DataError: If the folder holds a run of the same call whose files have changed since, unless `restart`. The
                folder is left as it is.
            UsageError: If it holds a run of another call, unless `restart`.
        """
        path = folder / JOURNAL_NAME
        run = json.loads(json.dumps({**run, "journal_version": _STATE_VERSION}))
        lines, length = _read(path)
        if lines and (different := run_difference(lines[0], run, name=f"{folder}: the interrupted run")) is not None:
            if not restart:
                raise different
            lines = []
        if not lines:
            _clear(folder)
            journal = cls(path, None, [])
            journal._append(run, [])
            return journal
        os.truncate(path, length)
        states = [line["state"] for line in lines[1:] if "state" in line]
        journal = cls(path, states[-1] if states else None, [line["finished"] for line in lines if "finished" in line])
        # Changes the journal of a folder that is resumed, but not of one from which a run was refused.
        journal._append({"resumed": sum("resumed" in line for line in lines) + 1}, [])
        return journal

    def due(self) -> bool:
        """Whether it is time to record again: a second after the last record, or after the first call of this method;
        later if recording is slow.
        """
        if self._next is None:
            self._next = time.monotonic() + _EVERY
        return time.monotonic() >= self._next

    def record(self, state: Mapping[str, Any], files: Iterable[RecordedFile]) -> None:
        """Sync `files`, then record `state`, which refers to their content."""
        started = time.monotonic()
        self._append({"state": state}, files)
        self.state = dict(state)
        ended = time.monotonic()
        self._next = ended + max(_EVERY, _SHARE * (ended - started))

    def finish(self, entry: Mapping[str, Any], files: Iterable[RecordedFile]) -> None:
        """Sync `files`, then record that the part which they hold is finished."""
        self._append({"finished": entry}, files)
        self.finished.append(dict(entry))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: Mapping[str, Any], files: Iterable[RecordedFile]) -> None:
        with ThreadPoolExecutor(_SYNC_THREADS) as threads:
            paths = list(threads.map(_sync, files))
        self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        # A file's name is stored in its folder, which must be synced too.
        unlisted = {*paths, self._path} - self._listed
        for folder in {path.parent for path in unlisted}:
            sync_path(folder)
        self._listed |= unlisted


def _sync(file: RecordedFile) -> Path:
    """Wait until the file is on the disk; its path."""
    if isinstance(file, ColumnFile):
        file.sync()
        return file.path
    if isinstance(file, Path):
        sync_path(file)
        return file
    file.flush()
    os.fsync(file.fileno())
    return Path(file.name)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a journal, and their length in bytes."""
    if not path.is_file():
        return [], 0
    lines, length = [], 0
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            lines.append(entry)
            length += len(line)
    return lines, length


def _clear(folder: Path) -> None:
    """Empty the folder. The journal goes first: without it, no run resumes from the rest."""
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


#: The keys of a run that list files.
_FILES = ("sources", "others")

#: Characters of a value, and number of differences, that a message shows.
_SHOWN_CHARACTERS = 100
_SHOWN_DIFFERENCES = 8


def run_difference(
    former: Mapping[str, Any], now: Mapping[str, Any], *, name: str, content: Mapping[str, str] = MappingProxyType({})
) -> DataError | UsageError | None:
    """In what an interrupted run differs from this one, as an error to raise: None if they are the same.

    Args:
        former: The interrupted run as it was recorded, as `Journal.open` describes it.
        now: This run.
        name: The interrupted run as the message names it.
        content: Keys that identify content by a hash, each with what the message says if it differs.

    Returns:
        DataError if files or other data have changed, UsageError if the call differs.
    """
    of_data = [words for key, words in content.items() if former.get(key) != now.get(key)]
    of_call = []
    for file, then, is_now in (pair for key in _FILES for pair in _pairs(former.get(key, []), now.get(key, []))):
        if then is None:
            of_call.append(f"{file} was not given then")
        elif is_now is None:
            of_call.append(f"{file} is not given now")
        elif then != is_now:
            of_data.append(f"{file} has changed: it is {_content(is_now)}, and was {_content(then)}")
    before, after = (_flat(run, leave_out={*_FILES, *content}) for run in (former, now))
    of_call += [
        f"{key} is {_shown(after.get(key))} and was {_shown(before.get(key))}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    if not (of_data or of_call) and any(former.get(key) != now.get(key) for key in _FILES):
        of_call.append("the sources are given in another order")
    found = of_data + of_call
    if not found:
        return None
    more = f"; and {len(found) - _SHOWN_DIFFERENCES} more differences" if len(found) > _SHOWN_DIFFERENCES else ""
    text = (
        f"{name} differs from this one: {'; '.join(found[:_SHOWN_DIFFERENCES])}{more}. "
        "Give the same files and options to resume it, or pass --overwrite to start over"
    )
    return UsageError(text) if of_call else DataError(text)


def _pairs(
    former: list[dict[str, Any]], now: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """Each file's name, with what was recorded of it then and what it is now; None if it was not given."""
    then, is_now = ({file["name"]: file for file in files} for files in (former, now))
    for name in dict.fromkeys([*is_now, *then]):
        yield name, then.get(name), is_now.get(name)


def _content(file: Mapping[str, Any]) -> str:
    """What identifies the content of a file, in words."""
    words = []
    for key, value in file.items():
        if value is None:
            continue
        if key == "bytes":
            words.append(f"{value} bytes")
        elif key == "mtime_ns":
            seconds, nanoseconds = divmod(value, 10**9)
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
            words.append(f"written at {moment}.{nanoseconds:09}")
        elif key != "name":
            words.append(f"{key} {value if isinstance(value, str) else json.dumps(value)}")
    return ", ".join(words)


def _flat(run: Mapping[str, Any], *, leave_out: set[str]) -> dict[str, Any]:
    """The other values of a run by the names that messages use: options as typed, keys with an article."""
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if key == "options":
            flat |= {f"--{name.replace('_', '-')}": option for name, option in value.items()}
        elif key not in leave_out:
            flat[f"the {key.replace('_', ' ')}"] = value
    return flat


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
