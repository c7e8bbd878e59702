"""A converted folder converts again, and every field of its conversations stays as it is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA, FORMAT, ROLES
from ismdata.convert.options import Cleaning, Selection
from ismdata.convert.pipeline import convert, explain_sources
from ismdata.data.conversations import ConversationWriter
from ismdata.data.index import describe_file, entries, write_index
from ismdata.errors import DataError
from tests.convert.test_named_splits import check_parts, lines, talk, texts
from tests.convert.test_selection import check_counts, rows_of
from tests.support.talks import FEW

TEXT = st.text(max_size=8).filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))
MAYBE = st.none() | TEXT
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(ROLES),
            "content": TEXT,
            "train": st.none() | st.booleans(),
            "weight": st.none() | st.floats(0, 10),
            "name": MAYBE,
            "tool_calls": MAYBE,
            "tool_call_id": MAYBE,
            "reasoning_content": MAYBE,
        }
    ),
    min_size=1,
    max_size=4,
)
ROWS = st.lists(
    st.fixed_dictionaries({"id": TEXT, "source": TEXT, "messages": MESSAGES, "tools": MAYBE, "meta": MAYBE}),
    min_size=1,
    max_size=8,
)


def converted(folder, rows):
    """A converted folder of these rows, whatever they hold."""
    folder.mkdir()
    writer = ConversationWriter(folder)
    writer.write(pa.Table.from_pylist(rows, CONVERSATION_SCHEMA))
    writer.close()
    (folder / "quarantine.jsonl").touch()
    counts = {"read": len(rows), "written": len(rows), "quarantined": {}}
    quarantine = entries([describe_file(folder / "quarantine.jsonl", 0)])[0]
    write_index(
        folder, {"format": FORMAT, "counts": counts, "shards": entries(writer.shards), "quarantine": quarantine}
    )
    return str(folder)


@FEW
@given(ROWS)
def test_every_field_stays(rows):
    with tempfile.TemporaryDirectory() as base:
        source = converted(Path(base) / "in", rows)
        convert([source], Path(base) / "out")
        assert rows_of(Path(base) / "out") == rows
        convert([str(Path(base) / "out")], Path(base) / "again")
        shard = "conversations-00000.arrow"
        assert (Path(base) / "out" / shard).read_bytes() == (Path(base) / "again" / shard).read_bytes()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "talks.jsonl").write_text(lines(*map(str, range(30)), "3"))
    convert([str(tmp_path / "talks.jsonl")], tmp_path / "c")
    return tmp_path / "c"


def test_it_is_cleaned_sampled_split_and_mixed(folder, tmp_path):
    report = convert([str(folder)], tmp_path / "dedup", selection=Selection(cleaning=Cleaning(dedup="exact")))
    assert (report.written, report.quarantined) == (30, {"duplicate": 1})
    report = convert([str(folder)], tmp_path / "split", selection=Selection(split="50/50"))
    check_counts(report, [tmp_path / "split" / name for name in report.parts])
    assert sum(report.parts.values()) == 31
    assert convert([str(folder)], tmp_path / "few", selection=Selection(sample=5)).written == 5
    (tmp_path / "more.jsonl").write_text(lines("x"))
    convert([str(folder), str(tmp_path / "more.jsonl")], tmp_path / "mixed")
    assert texts(tmp_path / "mixed") == [*texts(folder), "x"]


def test_a_folder_of_splits_stays_one_or_is_split_anew(folder, tmp_path):
    first = convert([str(folder)], tmp_path / "split", selection=Selection(split="50/50"))
    again = convert([str(tmp_path / "split")], tmp_path / "same")
    assert again.parts == first.parts
    for name in first.parts:
        assert rows_of(tmp_path / "same" / name) == rows_of(tmp_path / "split" / name)
    anew = convert([str(tmp_path / "split")], tmp_path / "anew", selection=Selection(split="0.9/0.1"))
    assert (
        sum(anew.parts.values()) == 31
        and "train and validation were drawn by --split, and are split anew" in anew.notes
    )
    convert([f"{tmp_path / 'split'}:train"], tmp_path / "one")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "split" / "train")
    convert([str(folder)], tmp_path / "rest", selection=Selection(against=(str(tmp_path / "split" / "train"),)))
    assert {*texts(tmp_path / "rest")} == {*texts(tmp_path / "split" / "validation")}


def test_splits_of_several_folders_are_joined_by_name(tmp_path):
    for name, text in (("a", "x"), ("b", "y")):
        record = {"train": [talk(text)], "dev": [talk(f"{text} dev")]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        convert([str(tmp_path / f"{name}.json")], tmp_path / name)
    report = convert([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")
    check_parts(report, train=["x", "y"], validation=["x dev", "y dev"])


def test_paths_of_a_tree_stay_in_one_part(tmp_path):
    rows = [
        {**row, "id": f"{n}/{k}", "source": f"t:{n}"} for n in range(40) for k in range(3) for row in [row_of(n, k)]
    ]
    report = convert([converted(tmp_path / "in", rows)], tmp_path / "out", selection=Selection(split="0.5/0.5"))
    sources = [{row["source"] for row in rows_of(tmp_path / "out" / name)} for name in report.parts]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 40


def row_of(n, k):
    optional = ("train", "weight", "name", "tool_calls", "tool_call_id", "reasoning_content")
    messages = [{"role": role, "content": f"{n} {k}", **dict.fromkeys(optional)} for role in ("user", "assistant")]
    return {"messages": messages, "tools": None, "meta": None}


def test_what_has_no_effect_is_noted_and_what_is_broken_is_named(folder, tmp_path):
    report = convert([str(folder)], tmp_path / "out", join=True, roles={"bot": "assistant"})
    assert [note.partition(" had")[0] for note in report.notes] == ["--role", "--join"]
    with pytest.raises(DataError, match=r"found a converted folder; .*ismdata inspect"):
        list(explain_sources([str(folder)]))
    shard = folder / "conversations-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"conversations-00000.arrow: \d+ bytes; expected"):
        convert([str(folder)], tmp_path / "broken")
