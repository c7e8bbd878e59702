"""Transcripts."""

from __future__ import annotations

from ismdata.convert.formats.registry import FORMATS


def test_annotations_are_counted_and_other_fields_kept():
    record = {
        "conversation_id": "c",
        "goal": {"a": 1},
        "log": [{"text": "a", "metadata": {}}, {"text": "b", "x": None}],
    }
    (draft,) = FORMATS["utterances"].parse_record(record)
    assert (draft.id, draft.extra, list(draft.ignored)) == ("c", {"goal": {"a": 1}}, ["log[].metadata"])
