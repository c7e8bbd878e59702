"""DailyDialog: one dialogue a line, `__eou__` after or between utterances, speakers alternate."""

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
from ismdata.convert.columnar import BLANKS, flat_list, mask
from ismdata.convert.corpus_format import Block, Columns, CorpusFormat, Draft, kind_of
from ismdata.convert.formats.speakers import alternating, spoken, turns
from ismdata.errors import Refused, shown

END_OF_UTTERANCE = "__eou__"
#: XDailyDialog has topic, acts and emotions beside the text: columns of numbers, one for the line or one an utterance.
_LABELS = re.compile(r"[0-9]+( [0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class DailyDialog(CorpusFormat):
    """Blanks around an utterance go, and so does the empty piece after a last `__eou__`.

    Columns of numbers after the text, set apart by tabs, are labels: they become the list `labels` in `meta`.
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
                found = f"the line has a tab, and after it {shown(label)} as column {number}"
                raise Refused("invalid_row", f"{found}; expected labels, which are numbers, or no tab")
        pieces = pieces_of(text, END_OF_UTTERANCE)
        extra = {"labels": labels} if labels else {}
        return [
            Draft(messages=spoken(roles, pieces), part=part, extra=extra)
            for part, roles in alternating(len(pieces), self.assistant)
        ]

    def parse_block(self, block: Block) -> Columns | None:
        lines = None if self.assistant == "both" else block.texts()
        if lines is None:
            return None
        columns = columns_of_lines(lines, END_OF_UTTERANCE, self.assistant)
        return replace(columns, care=columns.care | mask(pc.match_substring(lines, "\t")))


def pieces_of(line: str, separator: str) -> list[str]:
    """The utterances of a line without the blanks around them; what is empty after a last separator is none.

    >>> pieces_of("Hi ! __eou__ Hello ! __eou__", "__eou__")
    ['Hi !', 'Hello !']
    """
    pieces = [piece.strip() for piece in line.split(separator)]
    return pieces if pieces[-1] else pieces[:-1]


def columns_of_lines(lines: pa.Array, separator: str, assistant: Side, *, fewest: int = 1) -> Columns:
    """`pieces_of` for string[N] at once; lines of less than `fewest` pieces need care. Not for "both"."""
    offsets, pieces = flat_list(pa.chunked_array([pc.split_pattern(lines, separator)]))
    pieces = pc.utf8_trim(pieces, BLANKS)
    keep = np.ones(len(pieces), np.bool_)
    last = offsets[1:] - 1
    keep[last] = ~mask(pc.equal(pieces, ""))[last]
    offsets = offsets_of(np.diff(offsets) - ~keep[last])
    return Columns(
        ids=None,
        offsets=offsets,
        roles=turns(offsets, assistant),
        contents=pieces.filter(pa.array(keep)),
        care=np.diff(offsets) < fewest,
    )


DAILYDIALOG = DailyDialog()
