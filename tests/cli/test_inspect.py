"""`inspect` finds a conversation by row, id or place, refused records by reason, and a packed one by its id."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ismdata.cli.main import app
from ismdata.cli.views import lookup
from ismdata.convert.pipeline import convert
from ismdata.pack import pack
from tests.pack.test_pack import bytes_tokenizer as bytes_tokenizer

CALL = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
RECORDS = [
    {
        "id": "a[b]/1",
        "messages": [{"role": "user", "content": "q[/b]"}, {"role": "assistant", "content": "re \x1b[31m"}],
    },
    {
        "messages": [
            {"role": "user", "content": "two"},
            {"role": "assistant", "tool_calls": [CALL], "train": False},
            {"role": "tool", "content": "12:00"},
            {"role": "assistant", "content": "noon", "reasoning_content": "look"},
        ],
        "topic": "time",
    },
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"id": "no", "messages": []},
]


def inspect(*words, code=0):
    result = CliRunner().invoke(app, ["inspect", *map(str, words)])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "data" / "talks.jsonl").write_text(lines + "broken\n")
    convert(["data/talks.jsonl"], tmp_path / "c")
    return "c"


def test_a_conversation_by_row_id_and_place(folder):
    by_row = inspect(folder, "--row", 1)
    assert "talks-2" in by_row and "row 1 of c · data/talks.jsonl:2" in by_row
    for part in ("topic", "assistant○", "clock", "12:00", "assistant●", "look"):
        assert part in by_row
    assert inspect(folder, "--id", "talks-2") == by_row
    assert inspect(folder, "--source", "data/talks.jsonl:2") == inspect(folder, "--source", "talks.jsonl:2") == by_row
    hostile = inspect(folder, "--id", "a[b]/1")
    assert "a[b]/1" in hostile and "q[/b]" in hostile and "\x1b" not in hostile
    (found,) = json.loads(inspect(folder, "--row", 1, "--json"))["conversations"]
    assert found["messages"][1] == {"role": "assistant", "train": False, "tool_calls": json.dumps([CALL])}


def test_a_place_that_was_refused_says_why(folder):
    shown = inspect(folder, "--source", "talks.jsonl:3")
    assert "refused: unknown_role" in shown and "narrator" in shown
    assert "refused: no_messages" in inspect(folder, "--id", "no")


def test_the_quarantine_by_reason(folder):
    everything = inspect(folder, "--quarantine", "all")
    for part in ("unknown_role  1", "no_messages  1", "invalid_json  1", "data/talks.jsonl:5", "broken"):
        assert part in everything
    one = inspect(folder, "--quarantine", "unknown_role")
    assert "narrator" in one and "broken" not in one
    assert "expected all, or one of: unknown_role" in inspect(folder, "--quarantine", "over_long", code=2)
    assert next(iter(json.loads(inspect(folder, "--quarantine", "all", "--json"))["quarantine"])) == "unknown_role"


def test_calls_that_find_nothing_say_what_there_is(folder):
    assert "expected 0 to 1" in inspect(folder, "--row", 2, code=2)
    assert "expected one like data/talks.jsonl:1" in inspect(folder, "--source", "x:1", code=2)
    assert "expected one like a[b]/1" in inspect(folder, "--id", "x", code=2)
    assert "exclude each other" in inspect(folder, "--id", "x", "--row", 0, code=2)
    assert "expected a packed one" in inspect(folder, "--row", 0, "--tokens", code=2)
    assert "expected a folder that `ismdata convert`" in inspect("absent", "--row", 0, code=1)


def test_splits_are_searched_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text(json.dumps({"train": RECORDS[:1], "dev": RECORDS[1:2]}))
    convert(["s.json"], tmp_path / "c")
    assert "row 0 of c/validation" in inspect("c", "--id", "s-dev-1")
    assert "row 0 of c/train" in inspect("c", "--source", "s.json:train:record 1")
    assert "Name c/train or c/validation" in inspect("c", "--row", 0, code=1)


def test_a_packed_conversation_by_id_and_its_tokens(folder, tmp_path, bytes_tokenizer):
    pack([tmp_path / "c"], tmp_path / "p", tokenizer=str(bytes_tokenizer), seq_len=256)
    shown = inspect("p", "--id", "a[b]/1")
    assert "a[b]/1" in shown and "q[/b]" in shown and "two" not in shown and "row 0 of p" in shown
    (document,) = json.loads(inspect("p", "--id", "a[b]/1", "--tokens", "--json"))["documents"]
    tokens = [token for span in document["spans"] for run in span["runs"] for token in run["tokens"]]
    assert len(tokens) == document["end"] - document["start"]
    assert "‹" in inspect("p", "--row", 0, "--tokens") and "‹" not in inspect("p", "--row", 0)
    assert "--quarantine all" in inspect("p", "--id", "a", code=2)
    assert "expected --id" in inspect("p", "--source", "talks.jsonl:2", code=2)


def test_pieces_belong_to_their_conversation():
    assert lookup._names("a#0", "a") and lookup._names("a", "a") and lookup._names("a#1#0", "a#1")
    assert not lookup._names("ab", "a") and not lookup._names("a#x", "a")
