"""`convert` end to end: what each format becomes, what is refused, and that no record is lost and no output partial."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ismdata.concurrency import map_in_order
from ismdata.conversation import CONVERSATION_SCHEMA
from ismdata.convert import Selection, job
from ismdata.convert.pipeline import convert
from ismdata.convert.sources import framing
from ismdata.convert.worker_pool import WorkerPool
from ismdata.data import conversations as conversation_files
from ismdata.errors import UsageError
from tests.support.reporters import Recorder

OPTIONAL = ("train", "weight", "name", "tool_calls", "tool_call_id", "reasoning_content")
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
TALK = [("user", "q"), ("assistant", "a")]


def rows_of(folder: Path):
    found = []
    for path in sorted(folder.glob("conversations-*.arrow")):
        with pa.ipc.open_stream(path) as stream:
            assert stream.schema.equals(CONVERSATION_SCHEMA)
            found += stream.read_all().to_pylist()
    return found


def refused(folder: Path):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def pairs(row):
    return [(message["role"], message["content"]) for message in row["messages"]]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def run(tmp_path):
    """Write a corpus and convert it. Returns the rows, the refusals and the report."""

    def run(data, name="corpus.jsonl", **options):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        report = convert([str(path)], tmp_path / "out", overwrite=True, **options)
        rows, quarantine = rows_of(tmp_path / "out"), refused(tmp_path / "out")
        assert report.read == report.written + sum(report.quarantined.values())
        assert (report.written, sum(report.quarantined.values())) == (len(rows), len(quarantine))
        return rows, quarantine, report

    return run


# ---- formats ----


@pytest.mark.parametrize(
    ("record", "format", "expected"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages", TALK),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "messages", TALK),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", TALK),
        (
            {"conversations": [{"from": "Human", "value": "q"}, {"from": "BING", "value": "a"}], "system": "s"},
            "sharegpt",
            [("system", "s"), *TALK],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", TALK),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["h", "b"]]},
            "alpaca",
            [("system", "s"), ("user", "h"), ("assistant", "b"), ("user", "q\ni"), ("assistant", "a")],
        ),
        (
            {"messages": [{"message": "q", "attrs": []}, {"message": "a"}, {"message": "r"}]},
            "kdconv",
            [*TALK, ("user", "r")],
        ),
        (["q", "a"], "lists", TALK),
        ({"dialog": ["q", "a"]}, "lists", TALK),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]},
            "messages",
            TALK[::-1],
        ),
        ({"messages": [{"role": "developer", "content": ""}, {"role": "user", "content": ""}]}, "messages",
         [("system", ""), ("user", "")]),
    ],
)  # fmt: skip
def test_each_format_is_detected_and_read(run, record, format, expected):
    for options in ({}, {"format": format}):
        rows, quarantine, report = run(lines(record), **options)
        assert [pairs(row) for row in rows] == [expected]
        assert not quarantine and report.sources[0].format == format


def test_dailydialog_lines(run):
    rows, quarantine, report = run(
        "Hello ! __eou__  Hi ! __eou__\n\nOne\u00a0__eou__ __eou__ Three __eou__\na __eou__ b\n"
    )
    assert [pairs(row) for row in rows] == [
        [("user", "Hello !"), ("assistant", "Hi !")],
        [("user", "a"), ("assistant", "b")],
    ]
    assert [(line["source"].rsplit(":")[-1], line["reason"]) for line in quarantine] == [("3", "empty_answer")]
    assert (report.sources[0].layout, report.sources[0].format) == ("text lines", "dailydialog")
    assert [row["id"] for row in rows] == ["corpus-1", "corpus-4"]


def test_tool_calls_and_results(run):
    record = {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": None, "function_call": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "noon", "tool_call_id": "c1", "name": "clock"},
            {"role": "assistant", "content": "Noon.", "train": False, "weight": 1},
            {"role": "assistant", "function_call": {"name": "clock", "arguments": {"zone": "CET"}}},
        ],
        "tools": [{"type": "function", "function": {"name": "clock"}}],
    }
    (row,), _, _ = run(lines(record))
    calls = row["messages"][1]
    assert (calls["role"], calls["content"], json.loads(calls["tool_calls"])) == ("assistant", None, [CALL])
    result = row["messages"][2]
    assert [result[name] for name in ("role", "content", "tool_call_id", "name")] == ["tool", "noon", "c1", "clock"]
    assert (row["messages"][3]["train"], row["messages"][3]["weight"]) == (False, 1.0)
    old = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    assert json.loads(row["messages"][4]["tool_calls"]) == [old]
    assert json.loads(row["tools"]) == record["tools"]
    assert row["meta"] is None


def test_sharegpt_function_calls(run):
    bare = {"name": "clock", "description": "tells the time", "parameters": {}}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "Noon."},
    ]
    records = [{"conversations": turns, "tools": tools} for tools in (json.dumps([bare]), "[]", "")]
    rows, quarantine, _ = run(
        lines(*records, {"conversations": [turns[0], {"from": "function_call", "value": "noon"}]})
    )
    assert [(m["role"], m["content"]) for m in rows[0]["messages"]] == [
        ("user", "q"), ("assistant", None), ("tool", "noon"), ("assistant", "Noon."),
    ]  # fmt: skip
    called = json.loads(rows[0]["messages"][1]["tool_calls"])
    assert called == [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    assert json.loads(rows[0]["tools"]) == [{"type": "function", "function": bare}]
    assert [row["tools"] for row in rows[1:]] == [None, None]
    assert [line["reason"] for line in quarantine] == ["invalid_tool_call"]


def test_typed_parts(run):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    image = [*parts, {"type": "image_url", "image_url": {"url": "x.png"}}]
    thought = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    records = [{"messages": [{"role": "user", "content": content}]} for content in (parts, image, 7, [7])]
    records.append({"messages": [{"role": "assistant", "content": thought, "loss_weight": 0.0}]})
    records.append({"messages": [{"role": "user", "content": "<image>"}], "images": ["x.png"]})
    rows, quarantine, _ = run(lines(*records))
    assert pairs(rows[0]) == [("user", "Hello")]
    answer = rows[1]["messages"][0]
    assert (answer["content"], answer["reasoning_content"], answer["weight"]) == ("a", "hm", 0.0)
    reasons = ["unsupported_content", "invalid_content", "invalid_content", "unsupported_content"]
    assert [line["reason"] for line in quarantine] == reasons


def test_other_fields_are_kept_or_counted(run):
    record = {
        "id": 7,
        "topic": "tea",
        "empty": None,
        "messages": [{"role": "user", "content": "q", "mood": "fine", "x": None}],
    }
    (row,), _, report = run(lines(record))
    assert (row["id"], json.loads(row["meta"])) == ("7", {"topic": "tea"})
    assert report.ignored_fields == {"messages[].mood": 1}


def test_ids_and_sources(run):
    turns = [{"role": "user", "content": "q"}]
    data = (
        b"\xef\xbb\xbf"
        + lines({"id": "a", "messages": turns})
        + b"\r\n"
        + lines({"messages": turns, "id": "a"}, {"messages": turns})
    )
    rows, _, _ = run(data)
    assert [row["id"] for row in rows] == ["a", "a", "corpus-4"]
    assert [row["source"].rsplit("/")[-1] for row in rows] == ["corpus.jsonl:1", "corpus.jsonl:3", "corpus.jsonl:4"]


def test_role_names_can_be_added(run):
    record = {"messages": [{"role": "Narrator", "content": "q"}, {"role": "assistant", "content": "a"}]}
    _, quarantine, _ = run(lines(record, {"messages": [{"role": "user", "content": "q"}]}))
    expected = "message 1 has role 'Narrator'; expected system, user, assistant or tool. "
    expected += "Map it with --role Narrator=assistant."
    assert (quarantine[0]["reason"], quarantine[0]["detail"]) == ("unknown_role", expected)
    assert quarantine[0]["record"] == record
    (row, _), quarantine, _ = run(lines(record, record), roles={"narrator": "user"})
    assert (pairs(row), quarantine) == (TALK, [])
    with pytest.raises(UsageError, match="'boss' is not a role; expected one of system, user, assistant, tool"):
        run(lines(record), roles={"bot": "boss"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [}', "invalid_json"),
        (b'{"messages": []', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not_utf8"),
        (b'{"messages": []}', "no_messages"),
        (b'{"messages": null}', "no_messages"),
        (b'{"message": []}', "missing_field"),
        (b'{"messages": "text"}', "invalid_field"),
        (b'{"messages": ["text"]}', "not_an_object"),
        (b"7", "not_an_object"),
        (b'{"messages": [{"content": "q"}]}', "missing_role"),
        (b'{"messages": [{"role": "user"}]}', "missing_content"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "missing_content"),
        ('{"messages": [{"role": "assistant", "content": " \u3000\\n"}]}'.encode(), "empty_answer"),
        (b'{"messages": [{"role": 7, "content": "q"}]}', "invalid_field"),
        (b'{"messages": [{"role": "user", "content": "q", "weight": -1}]}', "invalid_field"),
        (b'{"messages": [{"role": "user", "content": "q", "weight": NaN}]}', "invalid_field"),
        (b'{"messages": [{"role": "user", "content": "q", "weight": 1e999}]}', "invalid_field"),
        (b'{"messages": [{"role": "user", "content": "q", "train": "yes"}]}', "invalid_field"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone_surrogate"),
        (b'{"messages": [{"role": "user", "content": "q"}], "tools": "clock"}', "invalid_tools"),
        (b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}', "invalid_tool_call"),
        (
            b'{"messages": [{"role": "user", "content": "q"}], "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            "invalid_json",
        ),
        (b'{"messages": [{"role": "user", "content": "q"}], "x": ' + b"9" * 5_000 + b"}", "invalid_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(run, line, reason):
    sound = lines({"messages": [{"role": "user", "content": "q"}]})
    rows, quarantine, report = run(sound + line + b"\n" + sound)
    assert [row["source"].rsplit(":")[-1] for row in rows] == ["1", "3"]
    assert [(entry["reason"], entry["source"].rsplit(":")[-1]) for entry in quarantine] == [(reason, "2")]
    assert report.first[reason].detail and report.quarantined == {reason: 1}


# ---- containers ----


def test_compression_and_archives(run, tmp_path):
    data = lines(["q", "a"], ["q", "b"])
    plain, _, _ = run(data, "corpus.jsonl")
    packed, _, _ = run(gzip.compress(data, mtime=0), "named-anything")
    assert [row["messages"] for row in plain] == [row["messages"] for row in packed]
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        archive.writestr("talks/one.jsonl", data)
        archive.writestr("talks/two.json", json.dumps([["q", "c"]], indent=1))
        archive.writestr("README.md", "read me")
    convert([str(tmp_path / "corpus.zip")], tmp_path / "zip")
    sources = [row["source"].rsplit("/", 1)[-1] for row in rows_of(tmp_path / "zip")]
    assert sources == ["one.jsonl:1", "one.jsonl:2", "two.json:record 1"]
    assert rows_of(tmp_path / "zip")[2]["source"].endswith("corpus.zip!talks/two.json:record 1")


def test_dailydialog_archives_and_folders(tmp_path):
    folder = tmp_path / "daily"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "dialogues_test.txt").write_text("a __eou__ b __eou__\n")
    (folder / "dialogues_text.txt").write_text("a __eou__ b __eou__\nc __eou__ d __eou__\n")
    for split, line in (("train", "c __eou__ d __eou__\n"), ("test", "a __eou__ b __eou__\n")):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            archive.writestr(f"{split}/dialogues_{split}.txt", line)
            archive.writestr(f"{split}/dialogues_act_{split}.txt", "1 2\n")
    convert([str(folder)], tmp_path / "out")
    for split in ("train", "test"):
        assert [row["id"] for row in rows_of(tmp_path / "out" / split)] == [f"dialogues_{split}-1"]


def test_splits_and_pretty_printed_values(run):
    rows, _, report = run(
        json.dumps({"film": [["q", "a"]], "valid": [["q", "b"], ["c"]]}),
        "talks.json",
        selection=Selection(splits="merge"),
    )
    assert [(row["id"], row["source"].rsplit("/")[-1]) for row in rows] == [
        ("talks-film-1", "talks.json:film:record 1"),
        ("talks-valid-1", "talks.json:valid:record 1"),
        ("talks-valid-2", "talks.json:valid:record 2"),
    ]
    assert report.sources[0].layout == "an object of splits"
    rows, _, report = run(json.dumps({"messages": [{"role": "user", "content": "a\nb"}]}, indent=2), "one.json")
    assert (pairs(rows[0]), report.sources[0].layout) == ([("user", "a\nb")], "JSON values")


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [
        {
            "id": "a",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "score": 0.5,
        },
        {
            "id": "b",
            "messages": [{"role": "user", "content": "q"}, {"role": "narrator", "content": "a"}],
            "score": None,
        },
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "talks.parquet")
    report = convert([str(tmp_path / "talks.parquet")], tmp_path / "parquet")
    (row,) = rows_of(tmp_path / "parquet")
    assert (row["id"], pairs(row), json.loads(row["meta"])) == ("a", TALK, {"score": 0.5})
    assert row["source"].endswith("talks.parquet:row 1")
    assert (report.quarantined, report.sources[0].layout) == ({"unknown_role": 1}, "Parquet")
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(records), "test": datasets.Dataset.from_list(records[:1])}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    report = convert([str(tmp_path / "saved")], tmp_path / "dataset")
    for split in ("train", "test"):
        (row,) = rows_of(tmp_path / "dataset" / split)
        assert row["source"].endswith(f"/saved!{split}:row 1")
    assert (report.read, [source.format for source in report.sources]) == (3, ["messages", "messages"])


def test_parquet_values_that_json_cannot_express(tmp_path):
    from datetime import datetime

    record = {"dialog": ["q", "a"], "when": datetime(2020, 1, 2), "raw": b"\xff", "score": float("nan")}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "talks.parquet")
    convert([str(tmp_path / "talks.parquet")], tmp_path / "out")
    assert json.loads(rows_of(tmp_path / "out")[0]["meta"]) == {"when": "2020-01-02T00:00:00", "raw": "/w=="}


# ---- the whole run ----


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(framing, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(conversation_files, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(job, "_BATCH_BYTES", 2000)
    monkeypatch.setattr(framing.ByteQueue.more, "__defaults__", (2000,))
    bad = {"messages": [{"role": "narrator", "content": "q"}]}
    records = [
        bad
        if n % 37 == 0
        else {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * n}]}
        for n in range(400)
    ]
    (tmp_path / "lines.jsonl").write_bytes(lines(*records))
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    sources = [str(tmp_path / "lines.jsonl"), str(tmp_path / "array.json")]
    hashes = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        report = convert(sources, out, workers=workers)
        assert (report.read, report.quarantined) == (800, {"unknown_role": 22})
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())})
    assert hashes[0] == hashes[1] == hashes[2]
    assert sum(name.startswith("conversations-") for name in hashes[0]) > 2
    expected = [f"{name}" for name in ("q" + str(n) for n in range(400) if n % 37)] * 2
    assert [row["messages"][0]["content"] for row in rows_of(tmp_path / "out1")] == expected


def test_few_blocks_are_read_ahead():
    given = []
    items = (given.append(n) or n for n in range(100))
    with WorkerPool(2, processes=False) as pool:
        for n, result in enumerate(
            map_in_order(lambda item: np.full(1, 2 * item), items, submit=pool.submit, pending=5)
        ):
            assert result[0] == 2 * n
            assert len(given) <= n + 5
    assert len(given) == 100


def test_the_index_describes_what_was_read(run, tmp_path):
    _, _, report = run(lines(["q", "a"], ["q", ""], []))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["format"] == "ismdata.conversations/1"
    assert index["counts"] == {"read": 3, "written": 1, "quarantined": {"empty_answer": 1, "no_messages": 1}}
    path = tmp_path / "corpus.jsonl"
    (source,) = index["sources"]
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source["bytes"], source["format"], source["records"]) == (path.stat().st_size, "lists", 3)
    for entry in [*index["shards"], index["quarantine"]]:
        data = (tmp_path / "out" / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (report.output, report.shards, report.seconds > 0) == (tmp_path / "out", 1, True)


def test_progress_ends_at_the_total(run):
    reporter = Recorder()
    run(lines(["q", "a"]), reporter=reporter)
    stage, done, total = reporter.steps[-1]
    assert stage == "convert" and done == total > 0


def test_convert_imports_nothing_heavy():
    code = "import sys, ismdata.convert; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
