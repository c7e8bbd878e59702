"""Filters: drop conversations that are too short, excluded, in another corpus, or repeat or resemble an earlier one.

All filters are off by default; only exact repeats are always counted. A dropped conversation goes to the quarantine
with one reason, the first of these that applies:

1. `too_few_turns`: it has fewer user and assistant messages than `min_turns`.
2. `excluded`: the content of one of its messages matches one of the patterns.
3. `in_other`: a corpus of `--against` contains the same conversation.
4. `duplicate`: an earlier conversation has the same digest (digests.py), whether that one was kept or not.
5. `near_duplicate`: an earlier conversation that was kept is similar (near_duplicates.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.conversation import ASSISTANT, ROLES, USER, Quarantined
from ismdata.convert.columnar import as_bools, flat_list
from ismdata.convert.digests import Digests, DigestSet, count_repeats, digests
from ismdata.convert.near_duplicates import MINIMA, NearIndex
from ismdata.convert.options import Cleaning
from ismdata.data import ColumnFile

#: Patterns with the same meaning in RE2, which searches a whole column at once, as in `re`: literals, `.` and `|`.
_PLAIN = re.compile(r"(?:[^\\^$(){}\[\]?*+]|\\[!-/:-@\[-`{-~])*")
#: RE2 limits the size of a compiled pattern; longer ones are left to `re`.
_PLAIN_LENGTH = 1000


class Cleaner:
    """Decides which conversations to keep, given all of them in order.

    Its state is in `columns`. In memory it needs 16 bytes per conversation for `dedup` (up to 48 while the set of
    digests grows), and about 5 kB per kept conversation for `dedup="near"`.

    Args:
        cleaning: Which conversations to drop.
        folder: The folder for the files of `columns`.
        against: uint64[N, 2], the digests of conversations that are dropped.
        keep: The number of rows of each column when the interrupted run recorded it; later rows are cut off. None or
            {} starts with empty columns.

    Raises:
        UsageError: If the package that `dedup="near"` needs is not installed.
        DataError: If a column has fewer rows than `keep` says.
    """

    def __init__(
        self, cleaning: Cleaning, folder: Path, *, against: Digests | None = None, keep: Mapping[str, int] | None = None
    ) -> None:
        self._cleaning = cleaning
        self._patterns = cleaning.patterns()
        rows = keep or {}
        self._seen = DigestSet() if cleaning.dedup else None
        self._near = NearIndex() if cleaning.dedup == "near" else None
        self._other: DigestSet | None = None
        if against is not None:
            self._other = DigestSet()
            self._other.add(against)
        #: The files to sync before a checkpoint, which records their `rows`.
        self.columns = {"digests": ColumnFile(folder / "digests", np.uint64, 2, keep=rows.get("digests", 0))}
        if self._seen is not None:
            self._seen.add(self.columns["digests"].map())
        if self._near is not None:
            column = ColumnFile(folder / "signatures", np.uint32, MINIMA, keep=rows.get("signatures", 0))
            self.columns["signatures"] = column
            self._near.restore(column.map())

    def apply(self, rows: pa.Table) -> tuple[NDArray[np.bool_], list[Quarantined]]:
        """Decide about the next N conversations.

        Returns:
            bool[N], which ones to keep, and the others in order, with their reasons.
        """
        found = digests(rows)
        self.columns["digests"].append(found)
        reasons: dict[int, tuple[str, str]] = {}
        kept = np.ones(len(rows), np.bool_)

        def drop(which: NDArray[np.bool_], reason: str, detail: Callable[[int], str]) -> None:
            for row in np.flatnonzero(which & kept).tolist():
                reasons[row] = (reason, detail(row))
            kept[which] = False

        if least := self._cleaning.min_turns:
            turns = turn_counts(rows)
            expected = f"expected at least {least} (--min-turns)"
            drop(turns < least, "too_few_turns", lambda row: f"{turns[row]} user and assistant messages; {expected}")
        for pattern in self._patterns:
            numbers = first_match(rows, pattern)
            drop(numbers > 0, "excluded", partial(_excluded, numbers, pattern))
        if self._other is not None:
            drop(self._other.contains(found), "in_other", lambda _: "a corpus of --against has the same conversation")
        if self._seen is not None:
            drop(~self._seen.add(found), "duplicate", lambda _: "the same as an earlier conversation")
        if self._near is not None:
            self._drop_near(rows, self._near, kept, reasons)
        if kept.all():
            return kept, []
        records = conversations(rows.filter(pa.array(~kept)))
        quarantined = [
            Quarantined(source=record["source"], reason=reason, detail=detail, record=record)
            for record, (_, (reason, detail)) in zip(records, sorted(reasons.items()), strict=True)
        ]
        return kept, quarantined

    def _drop_near(
        self, rows: pa.Table, near: NearIndex, kept: NDArray[np.bool_], reasons: dict[int, tuple[str, str]]
    ) -> None:
        """Drop near duplicates among the kept rows, updating `kept` and `reasons`."""
        offsets, messages = flat_list(rows.column("messages"))
        contents = messages.field("content")
        before = len(near)
        for row in np.flatnonzero(kept).tolist():
            texts = contents.slice(offsets[row], offsets[row + 1] - offsets[row]).drop_null().to_pylist()
            signature = near.signature("\n".join(texts))
            nearest = near.nearest(signature)
            if nearest is None:
                near.add(signature)
                continue
            number, similarity = nearest
            kept[row] = False
            detail = f"about {similarity:.0%} similar to conversation {number} of those kept, counted from 0"
            reasons[row] = ("near_duplicate", detail)
        self.columns["signatures"].append(near.signatures[before:])

    def duplicates(self) -> int:
        """Count the conversations that are the same as an earlier one, kept or not. Call it last: it closes files."""
        for column in self.columns.values():
            column.close()
        return count_repeats(self.columns["digests"].map())


def _excluded(numbers: NDArray[np.int64], pattern: re.Pattern[str], row: int) -> str:
    return f"message {numbers[row]} matches --exclude {pattern.pattern!r}"


def turn_counts(rows: pa.Table) -> NDArray[np.int64]:
    """The number of user and assistant messages of each conversation, int64[N]."""
    offsets, messages = flat_list(rows.column("messages"))
    counted = pa.array([ROLES[USER], ROLES[ASSISTANT]])
    before = offsets_of(as_bools(pc.is_in(messages.field("role"), value_set=counted)).astype(np.int64))
    counts: NDArray[np.int64] = before[offsets[1:]] - before[offsets[:-1]]
    return counts


def first_match(rows: pa.Table, pattern: re.Pattern[str]) -> NDArray[np.int64]:
    """The number of the first message of each conversation in whose content the pattern matches, int64[N].

    Messages are counted from 1; 0 if none matches.
    """
    offsets, messages = flat_list(rows.column("messages"))
    contents = messages.field("content")
    if len(pattern.pattern) <= _PLAIN_LENGTH and _PLAIN.fullmatch(pattern.pattern):
        found = as_bools(pc.fill_null(pc.match_substring_regex(contents, pattern.pattern), False))
    else:
        texts = contents.to_pylist()
        found = np.fromiter((text is not None and bool(pattern.search(text)) for text in texts), np.bool_, len(texts))
    matches = np.append(np.flatnonzero(found), len(found))
    nearest = matches[np.searchsorted(matches, offsets[:-1])]
    numbers: NDArray[np.int64] = np.where(nearest < offsets[1:], nearest - offsets[:-1] + 1, 0)
    return numbers


def conversations(rows: pa.Table) -> list[dict[str, Any]]:
    """Rows of CONVERSATION_SCHEMA as JSON values, without null fields."""
    listed = rows.to_pylist()
    for row in listed:
        row["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
    return [{key: value for key, value in row.items() if value is not None} for row in listed]
