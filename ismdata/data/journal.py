"""What a run has finished, so that the same command goes on after a crash.

`journal.jsonl` lies in the folder that is being written. Its first line says which run this is; every further line was
appended after all that it speaks of had reached the disk. A line that a crash tore is as if it had not been written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from ismdata.data.column_file import ColumnFile
from ismdata.data.output_folder import JOURNAL_NAME, sync_path
from ismdata.errors import DataError, UsageError

#: Seconds between two records; more where recording takes long, so that it never costs over a twentieth of the time.
_EVERY = 1.0
_SHARE = 20

#: Files that are brought to the disk side by side.
_SYNCED_AT_ONCE = 8


class Journal:
    """The record of one run. `state`: what was recorded last, None at a fresh start. `finished`: all finished parts.

    `folders.output_folder(resumable=True)` takes the file away when the folder is in place.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None, finished: list[dict[str, Any]]) -> None:
        self.state, self.finished = state, finished
        self._path = path
        self._file = path.open("ab")
        self._listed: set[Path] = set()
        self._next: float | None = None

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Any], *, restart: bool) -> Journal:
        """Go on with the run that `folder` holds, or clear the folder and begin.

        run: what makes two runs the same, as JSON: `sources` (and `others`), lists of objects with a `name` and what
        tells a file's content, beside the command, the version, the options and whatever else the output depends on.
        restart: begin anew where the folder holds another run. Otherwise raises DataError where a source is another
        one, UsageError where the call is; the folder is left as it is.
        """
        path = folder / JOURNAL_NAME
        run = json.loads(json.dumps(run))
        lines, length = _read(path)
        if lines and (different := _difference(lines[0], run)) is not None:
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
        # Tells a folder that this run has taken over from one that it was refused.
        journal._append({"resumed": sum("resumed" in line for line in lines) + 1}, [])
        return journal

    def due(self) -> bool:
        """Whether it is time to record again: a second after the last time, or after this was first asked; longer where
        recording is slow.
        """
        if self._next is None:
            self._next = time.monotonic() + _EVERY
        return time.monotonic() >= self._next

    def record(self, state: Mapping[str, Any], files: Iterable[ColumnFile | IO[bytes] | Path]) -> None:
        """Remember `state`, which speaks of what stands in `files` now."""
        started = time.monotonic()
        self._append({"state": state}, files)
        self.state = dict(state)
        ended = time.monotonic()
        self._next = ended + max(_EVERY, _SHARE * (ended - started))

    def finish(self, entry: Mapping[str, Any], files: Iterable[ColumnFile | IO[bytes] | Path]) -> None:
        """Remember that a part is finished, which stands in `files`."""
        self._append({"finished": entry}, files)
        self.finished.append(dict(entry))

    def close(self) -> None:
        self._file.close()

    def _append(self, line: Mapping[str, Any], files: Iterable[ColumnFile | IO[bytes] | Path]) -> None:
        # Side by side: a disk brings several files to rest in little more time than one of them.
        with ThreadPoolExecutor(_SYNCED_AT_ONCE) as threads:
            named = list(threads.map(_sync, files))
        self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        # The name of a file must last, too: that is up to its folder.
        unlisted = {*named, self._path} - self._listed
        for folder in {path.parent for path in unlisted}:
            sync_path(folder)
        self._listed |= unlisted


def _sync(file: ColumnFile | IO[bytes] | Path) -> Path:
    """Return, with its path, when the file is on the disk."""
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
    """The complete lines of a journal, and how many bytes they are."""
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
    # The journal goes first: without it the rest is nothing to go on from.
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


#: What of a run is files.
_FILES = ("sources", "others")

#: Characters of an option's value in a message.
_MOST_SHOWN = 100

_GO_ON = "Give the same files and options again to go on with it, or --overwrite to start over"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> DataError | UsageError | None:
    """What to say of the first thing in which two runs differ."""
    for name, expected, found in (pair for key in _FILES for pair in _pairs(before.get(key, []), now.get(key, []))):
        if expected is None or found is None:
            change = "was not given to" if expected is None else "is not given now, but was to"
            return UsageError(f"{name}: {change} the run that was interrupted. {_GO_ON}")
        if expected != found:
            return DataError(
                f"{name}: changed since the run that was interrupted: found {_shown(found)}; "
                f"expected {_shown(expected)}. {_GO_ON}"
            )
    old, new = _flat(before), _flat(now)
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            return UsageError(
                f"{key} is {_value(new, key)}; the run that was interrupted had {_value(old, key)}. {_GO_ON}"
            )
    if any(before.get(key) != now.get(key) for key in _FILES):
        return UsageError(f"the sources are given in another order than in the run that was interrupted. {_GO_ON}")
    return None


def _pairs(
    before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """Each source by its name, as it was and as it is."""
    old, new = ({source["name"]: source for source in sources} for sources in (before, now))
    for name in [*new, *(name for name in old if name not in new)]:
        yield name, old.get(name), new.get(name)


def _shown(source: Mapping[str, Any]) -> str:
    """What tells the content of a source, in words."""
    words = []
    for key, value in source.items():
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


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """All of a run but its files: options by their names on the command line, the rest by its path."""
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if key == "options":
            flat |= {f"--{name.replace('_', '-')}": of for name, of in value.items()}
        elif key not in _FILES:
            flat[f"the {key.replace('_', ' ')}"] = value
    return flat


def _value(flat: Mapping[str, Any], key: str) -> str:
    text = json.dumps(flat[key], ensure_ascii=False) if flat.get(key) is not None else "not given"
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"
