"""Lines of text with a tab between utterances: a question and its reply, or more; the speakers alternate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.choices import Side
from ismdata.convert.corpus_format import Block, Columns, CorpusFormat, Draft, kind_of
from ismdata.convert.formats.dailydialog import END_OF_UTTERANCE, columns_of_lines, split_utterances
from ismdata.convert.formats.known_shapes import DIALOGPT_LINE
from ismdata.convert.formats.speakers import alternating_roles, to_messages
from ismdata.errors import Refused


@dataclass(frozen=True, kw_only=True)
class TabPairs(CorpusFormat):
    """Whitespace around an utterance is removed."""

    expects: str = "lines of text: question, tab, reply"
    plain_text: bool = True
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        if not isinstance(record, str) or END_OF_UTTERANCE in record or re.match(DIALOGPT_LINE, record):
            return False
        cells = record.split("\t")
        return len(cells) > 1 and all(any(map(str.isalpha, cell)) for cell in cells)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if not isinstance(record, str):
            raise Refused("not_an_object", f"the record is {kind_of(record)}; expected a line of text")
        utterances = split_utterances(record, "\t")
        if len(utterances) < 2:
            raise Refused("not_an_object", "the line has no tab between utterances; expected question, tab, reply")
        return [
            Draft(messages=to_messages(roles, utterances), id_suffix=part)
            for part, roles in alternating_roles(len(utterances), self.assistant)
        ]

    def parse_block(self, block: Block) -> Columns | None:
        lines = None if self.assistant == "both" else block.texts()
        if lines is None:
            return None
        return columns_of_lines(lines, "\t", self.assistant, fewest=2)


TSV_PAIRS = TabPairs()
