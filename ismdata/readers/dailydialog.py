"""DailyDialog: one dialogue a line, `__eou__` after or between utterances, speakers alternate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.readers.base import Block, Columns, Draft, Reader, Refused, Side, kind_of
from ismdata.readers.columnar import BLANKS, flat_list, mask, offsets_of
from ismdata.readers.speakers import alternating, turns

END_OF_UTTERANCE = "__eou__"


@dataclass(frozen=True, kw_only=True)
class DailyDialog(Reader):
    """Blanks around an utterance go, and so does the empty piece after a last `__eou__`."""

    expects: str = "lines of text with __eou__ after each utterance"
    plain_text: bool = True
    assistant: Side = "second"

    def fits(self, record: Any) -> bool:
        return isinstance(record, str) and END_OF_UTTERANCE in record and "\t" not in record

    def drafts(self, record: Any) -> Sequence[Draft]:
        if not isinstance(record, str):
            raise Refused("not_an_object", f"the record is {kind_of(record)}; expected a line of text")
        if "\t" in record:  # labels beside the text, as XDailyDialog has them, are no utterances
            raise Refused("not_an_object", "the line has columns set apart by tabs; expected utterances only")
        pieces = [piece.strip() for piece in record.split(END_OF_UTTERANCE)]
        if not pieces[-1]:
            pieces.pop()
        return [
            Draft(
                messages=[{"role": role, "content": piece} for role, piece in zip(roles, pieces, strict=True)],
                part=part,
            )
            for part, roles in alternating(len(pieces), self.assistant)
        ]

    def columns(self, block: Block) -> Columns | None:
        lines = block.texts()
        if lines is None or self.assistant == "both":
            return None
        offsets, pieces = flat_list(pa.chunked_array([pc.split_pattern(lines, END_OF_UTTERANCE)]))
        pieces = pc.utf8_trim(pieces, BLANKS)
        keep = np.ones(len(pieces), np.bool_)
        last = offsets[1:] - 1
        keep[last] = ~mask(pc.equal(pieces, ""))[last]
        offsets = offsets_of(np.diff(offsets) - ~keep[last])
        return Columns(
            ids=None,
            offsets=offsets,
            roles=turns(offsets, self.assistant),
            contents=pieces.filter(pa.array(keep)),
            care=(np.diff(offsets) == 0) | mask(pc.match_substring(lines, "\t")),
        )


DAILYDIALOG = DailyDialog()
