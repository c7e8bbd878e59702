"""Rows of a table."""

from __future__ import annotations

from ismdata.convert.formats.registry import FORMATS, detect
from tests.support.shapes import A, U


def test_commas_of_empathetic_dialogues():
    row = {
        "conv_id": "c",
        "utterance_idx": "1",
        "context": "x",
        "prompt": "y",
        "speaker_idx": "3",
        "utterance": "a_comma_ b",
    }
    assert detect(row) == "dialogue_rows"
    (draft,) = FORMATS["dialogue_rows"].parse_record(
        [row, {**row, "utterance_idx": "2", "speaker_idx": "0", "utterance": "c"}]
    )
    assert [(one["role"], one["content"]) for one in draft.messages] == [(U, "a, b"), (A, "c")]
