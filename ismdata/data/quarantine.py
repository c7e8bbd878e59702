"""`quarantine.jsonl`: every refused record of a run, one JSON object per line, with the reason of the refusal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ismdata.conversation import Quarantined
from ismdata.data.output_folder import QUARANTINE_NAME, reopen
from ismdata.errors import shown


class Quarantine:
    """Writes refused records to `quarantine.jsonl` and counts them by reason.

    Args:
        folder: The folder of the file.
        state: What `state` returned when the interrupted run recorded it; lines written later are cut off. None starts
            an empty file.

    Raises:
        DataError: If the file is shorter than `state` says.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"reasons": {}, "first": [], "length": 0}
        #: Number of refused records by reason.
        self.reasons = Counter[str](state["reasons"])
        #: The first refusal of each reason; its record is None if it was refused before an interruption.
        self.first = {entry["reason"]: Quarantined(**entry, record=None) for entry in state["first"]}
        self._file = reopen(folder / QUARANTINE_NAME, state["length"])

    def add(self, refused: Iterable[Quarantined]) -> None:
        """Write one line per refused record."""
        for each in refused:
            self.reasons[each.reason] += 1
            self.first.setdefault(each.reason, each)
            self._file.write(quarantine_line(each))

    def state(self) -> dict[str, Any]:
        """What a later run needs to resume here, as JSON: valid once `files` are synced."""
        first = [{"source": each.source, "reason": each.reason, "detail": each.detail} for each in self.first.values()]
        return {"reasons": dict(self.reasons), "first": first, "length": self._file.tell()}

    def files(self) -> list[IO[bytes]]:
        """The files to sync before `state` is recorded."""
        return [self._file]

    def close(self) -> None:
        """Close the file; nothing can be added afterwards."""
        self._file.close()


def quarantine_line(refused: Quarantined) -> bytes:
    """A line of `quarantine.jsonl` as UTF-8.

    Args:
        refused: The refused record.

    Returns:
        The line with its line break. Text that UTF-8 cannot hold is escaped; a record that JSON cannot hold is written
        as the text of its Python representation.
    """
    line = refused.as_json()
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line, allow_nan=False).encode("ascii") + b"\n"
    except (ValueError, RecursionError):
        return json.dumps({**line, "record": shown(refused.record)}).encode("ascii") + b"\n"
