"""Leaving out what the user does not want: repeats, near repeats, what is too short, excluded or in another corpus.

All of it is off unless asked for; only the repeats are always counted. A conversation that is left out goes to the
quarantine with one reason, the first of these that holds:

1. `too_few_turns`: fewer user and assistant messages than `min_turns`;
2. `excluded`: the content of one of its messages matches one of the patterns;
3. `in_other`: the other corpus has the same conversation;
4. `duplicate`: an earlier conversation of this one is the same, as `digests` tells it, whatever became of that one;
5. `near_duplicate`: an earlier conversation that was kept is similar, as `near` tells it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import offsets_of
from ismdata.choices import Dedup
from ismdata.conversation import ASSISTANT, ROLES, USER, Quarantined
from ismdata.convert.columnar import as_bools, flat_list
from ismdata.convert.digests import Digests, DigestSet, digests, repeats
from ismdata.convert.near_duplicates import MINIMA, NearIndex
from ismdata.data import ColumnFile, ConvertedFolder
from ismdata.errors import UsageError

#: Patterns that mean the same to RE2, which searches a column at once, as to `re`: texts, `.` and `|`.
_PLAIN = re.compile(r"(?:[^\\^$(){}\[\]?*+]|\\[!-/:-@\[-`{-~])*")
#: RE2 limits what a pattern may come to; `re` takes the longer ones.
_PLAIN_LENGTH = 1000


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What to leave out. `exclude` holds regular expressions as Python's `re` has them, searched in each content.

    `dedup="near"` implies "exact". Raises UsageError when an option cannot be.
    """

    dedup: Dedup | None = None
    min_turns: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dedup not in (None, "exact", "near"):
            raise UsageError(f"--dedup {self.dedup}: expected exact or near")
        if self.min_turns < 0:
            raise UsageError(f"--min-turns {self.min_turns}: expected 0 or more")
        self.patterns()

    def patterns(self) -> list[re.Pattern[str]]:
        """`exclude`, compiled."""
        return [_compiled(pattern) for pattern in self.exclude]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        pattern.encode()
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise UsageError(
            f"--exclude {pattern!r}: not a regular expression ({error}); expected one as Python's re has them. "
            "Put a backslash before a mark that is meant as itself"
        ) from error


class Cleaner:
    """Takes conversations in order and says which to keep. What it remembers lies in `columns`, and for some options in
    memory too: 16 bytes a conversation (up to 48 for a moment) with `dedup` for its digest, and about 5 kB for each
    that is kept under "near".

    folder: where the columns lie. against: digests uint64[N, 2] of another corpus whose conversations are left out.
    keep: the rows of each column to go on after, as they were when an earlier run was interrupted; {} or None begins.
    Raises UsageError when the package that `dedup="near"` needs is absent, DataError when a column is too short.
    """

    def __init__(
        self, cleaning: Cleaning, folder: Path, *, against: Digests | None = None, keep: Mapping[str, int] | None = None
    ) -> None:
        self._cleaning = cleaning
        self._patterns = cleaning.patterns()
        kept = keep or {}
        self._seen = DigestSet() if cleaning.dedup else None
        self._near = NearIndex() if cleaning.dedup == "near" else None
        self._other: DigestSet | None = None
        if against is not None:
            self._other = DigestSet()
            self._other.add(against)
        #: What a checkpoint has to sync and to record the `rows` of.
        self.columns = {"digests": ColumnFile(folder / "digests", np.uint64, 2, keep=kept.get("digests", 0))}
        if self._seen is not None:
            self._seen.add(self.columns["digests"].map())
        if self._near is not None:
            column = ColumnFile(folder / "signatures", np.uint32, MINIMA, keep=kept.get("signatures", 0))
            self.columns["signatures"] = column
            self._near.restore(column.map())

    def apply(self, rows: pa.Table) -> tuple[NDArray[np.bool_], list[Quarantined]]:
        """Which of these conversations to keep, bool[N], and the others with their reasons, in order."""
        found = digests(rows)
        self.columns["digests"].append(found)
        reasons: dict[int, tuple[str, str]] = {}
        left = np.ones(len(rows), np.bool_)

        def leave_out(which: NDArray[np.bool_], reason: str, detail: Callable[[int], str]) -> None:
            for row in np.flatnonzero(which & left).tolist():
                reasons[row] = (reason, detail(row))
            left[which] = False

        if least := self._cleaning.min_turns:
            turns = turn_counts(rows)
            expected = f"expected at least {least} (--min-turns)"
            leave_out(
                turns < least, "too_few_turns", lambda row: f"{turns[row]} user and assistant messages; {expected}"
            )
        for pattern in self._patterns:
            numbers = first_match(rows, pattern)
            leave_out(numbers > 0, "excluded", partial(_excluded, numbers, pattern))
        if self._other is not None:
            leave_out(self._other.among(found), "in_other", lambda _: "the corpus that --against names has the same")
        if self._seen is not None:
            leave_out(~self._seen.add(found), "duplicate", lambda _: "the same as an earlier conversation")
        if self._near is not None:
            self._leave_out_near(rows, self._near, left, reasons)
        if left.all():
            return left, []
        records = conversations(rows.filter(pa.array(~left)))
        quarantined = [
            Quarantined(source=record["source"], reason=reason, detail=detail, record=record)
            for record, (_, (reason, detail)) in zip(records, sorted(reasons.items()), strict=True)
        ]
        return left, quarantined

    def _leave_out_near(
        self, rows: pa.Table, near: NearIndex, left: NDArray[np.bool_], reasons: dict[int, tuple[str, str]]
    ) -> None:
        offsets, messages = flat_list(rows.column("messages"))
        contents = messages.field("content")
        before = len(near)
        for row in np.flatnonzero(left).tolist():
            texts = contents.slice(offsets[row], offsets[row + 1] - offsets[row]).drop_null().to_pylist()
            signature = near.signature("\n".join(texts))
            nearest = near.nearest(signature)
            if nearest is None:
                near.add(signature)
                continue
            number, similarity = nearest
            left[row] = False
            reasons[row] = (
                "near_duplicate",
                f"about {similarity:.0%} alike: conversation {number} of those kept, counted from 0",
            )
        self.columns["signatures"].append(near.signatures[before:])

    def duplicates(self) -> int:
        """How many conversations repeat an earlier one exactly, kept or not. Closes the columns: the last call."""
        for column in self.columns.values():
            column.close()
        return repeats(self.columns["digests"].map())


def _excluded(numbers: NDArray[np.int64], pattern: re.Pattern[str], row: int) -> str:
    return f"message {numbers[row]} matches --exclude {pattern.pattern!r}"


def turn_counts(rows: pa.Table) -> NDArray[np.int64]:
    """User and assistant messages of each conversation, int64[N]."""
    offsets, messages = flat_list(rows.column("messages"))
    talk = pa.array([ROLES[USER], ROLES[ASSISTANT]])
    before = offsets_of(as_bools(pc.is_in(messages.field("role"), value_set=talk)).astype(np.int64))
    counts: NDArray[np.int64] = before[offsets[1:]] - before[offsets[:-1]]
    return counts


def first_match(rows: pa.Table, pattern: re.Pattern[str]) -> NDArray[np.int64]:
    """The first message of each conversation whose content the pattern is found in, counted from 1, 0 where there is
    none: int64[N].
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
    """Rows as JSON has them, without their null fields."""
    listed = rows.to_pylist()
    for row in listed:
        row["messages"] = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
    return [{key: value for key, value in row.items() if value is not None} for row in listed]


def against_digests(folder: Path) -> Digests:
    """Digests uint64[N, 2] of the conversations of a converted folder.

    Raises DataError when it is not one, or a shard is missing, cut off or not readable.
    """
    batches = (pa.Table.from_batches([batch]) for batch in ConvertedFolder(folder).batches())
    return np.concatenate([np.empty((0, 2), np.uint64), *map(digests, batches)])
