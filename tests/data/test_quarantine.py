"""The quarantine: one line per refused record, whatever it holds, counted; resumed at the recorded byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ismdata.conversation import Quarantined
from ismdata.data.quarantine import Quarantine, quarantine_line
from ismdata.errors import DataError


def refusal(number: int, reason: str = "no_messages") -> Quarantined:
    return Quarantined(source=f"a.jsonl:{number}", reason=reason, detail=f"the {number}th", record={"n": number})


def test_lines_are_counted_and_the_first_of_each_reason_is_kept(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.add([refusal(1), refusal(2, "rejected"), refusal(3)])
    quarantine.close()
    assert quarantine.reasons == {"no_messages": 2, "rejected": 1}
    assert [each.source for each in quarantine.first.values()] == ["a.jsonl:1", "a.jsonl:2"]
    lines = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        refusal(number, reason).as_json()
        for number, reason in ((1, "no_messages"), (2, "rejected"), (3, "no_messages"))
    ]


def test_an_interrupted_quarantine_is_cut_back_and_continued(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.add([refusal(1)])
    state = json.loads(json.dumps(quarantine.state()))
    quarantine.add([refusal(2, "rejected")])
    quarantine.close()
    resumed = Quarantine(tmp_path, state)
    assert (resumed.reasons, list(resumed.first)) == ({"no_messages": 1}, ["no_messages"])
    resumed.add([refusal(3)])
    resumed.close()
    assert (tmp_path / "quarantine.jsonl").read_bytes() == quarantine_line(refusal(1)) + quarantine_line(refusal(3))


def test_a_file_shorter_than_recorded_is_refused(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.add([refusal(1)])
    state = quarantine.state()
    quarantine.close()
    (tmp_path / "quarantine.jsonl").write_bytes(b"{}")
    with pytest.raises(
        DataError, match=r"quarantine\.jsonl: 2 bytes; expected at least \d+.*run the same command again"
    ):
        Quarantine(tmp_path, state)
    (tmp_path / "quarantine.jsonl").unlink()
    with pytest.raises(DataError, match=r"quarantine\.jsonl: 0 bytes"):
        Quarantine(tmp_path, state)


@pytest.mark.parametrize(
    ("record", "written"),
    [("ü", '"ü"'), ("\ud800", '"\\ud800"'), (float("nan"), '"nan"')],
    ids=["text", "lone-surrogate", "nan"],
)
def test_any_record_has_a_line(record: Any, written: str) -> None:
    line = quarantine_line(Quarantined(source="a:1", reason="rejected", detail="so", record=record)).decode()
    assert line.endswith(f'"record": {written}}}\n')
    json.loads(line)
