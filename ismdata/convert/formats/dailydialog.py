"""DailyDialog: one dialogue per line, with `__eou__` after each utterance or between two; the speakers alternate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.arrays import offsets_of
from ismdata.choices import Side
from ismdata.convert.columnar import WHITESPACE, as_bools, flat_list
from ismdata.convert.corpus_format import Block, Columns, CorpusFormat, Draft, kind_of
from ismdata.convert.formats.speakers import alternating_role_column, alternating_roles, to_messages
from ismdata.errors import Refused, shown

END_OF_UTTERANCE = "__eou__"
#: XDailyDialog has topic, acts and emotions after the text: columns of numbers, one per line or one per utterance.
_LABELS = re.compile(r"[0-9]+( [0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class DailyDialog(CorpusFormat):
    """Whitespace around an utterance is removed, and so is the empty piece after a final `__eou__`.

    Columns of numbers after the text, separated by tabs, are labels: they become the list `labels` in `meta`.
    """

    expects: str = "lines of text with __eou__ after each utterance"
    plain_text: bool = True
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        if not isinstance(record, str):
            return False
        text, *labels = record.split("\t")
        return END_OF_UTTERANCE in text and all(map(_LABELS.fullmatch, labels))

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if not isinstance(record, str):
            raise Refused("not_an_object", f"the record is {kind_of(record)}; expected a line of text")
        text, *labels = record.split("\t")
        for number, label in enumerate(labels, 2):
            if not _LABELS.fullmatch(label):
                found = f"after a tab, column {number} of the line is {shown(label)}"
                raise Refused("invalid_row", f"{found}; expected labels, which are numbers, or no tab")
        utterances = split_utterances(text, END_OF_UTTERANCE)
        extra = {"labels": labels} if labels else {}
        return [
            Draft(messages=to_messages(roles, utterances), id_suffix=part, extra=extra)
            for part, roles in alternating_roles(len(utterances), self.assistant)
        ]

    def parse_block(self, block: Block) -> Columns | None:
        lines = None if self.assistant == "both" else block.texts()
        if lines is None:
            return None
        columns = columns_of_lines(lines, END_OF_UTTERANCE, self.assistant)
        return replace(columns, fallback=columns.fallback | as_bools(pc.match_substring(lines, "\t")))


def split_utterances(line: str, separator: str) -> list[str]:
    """The utterances of a line without surrounding whitespace; an empty piece after the last separator is dropped.

    >>> split_utterances("Hi ! __eou__ Hello ! __eou__", "__eou__")
    ['Hi !', 'Hello !']
    """
    pieces = [piece.strip() for piece in line.split(separator)]
    return pieces if pieces[-1] else pieces[:-1]


def columns_of_lines(lines: pa.Array, separator: str, assistant: Side, *, fewest: int = 1) -> Columns:
    """`split_utterances` of string[N] at once. Fallback: lines with fewer than `fewest` utterances. Not for "both"."""
    offsets, pieces = flat_list(pa.chunked_array([pc.split_pattern(lines, separator)]))
    pieces = pc.utf8_trim(pieces, WHITESPACE)
    keep = np.ones(len(pieces), np.bool_)
    last = offsets[1:] - 1
    keep[last] = ~as_bools(pc.equal(pieces, ""))[last]
    offsets = offsets_of(np.diff(offsets) - ~keep[last])
    return Columns(
        ids=None,
        offsets=offsets,
        roles=alternating_role_column(offsets, assistant),
        contents=pieces.filter(pa.array(keep)),
        fallback=np.diff(offsets) < fewest,
    )


DAILYDIALOG = DailyDialog()
