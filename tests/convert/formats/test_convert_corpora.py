"""Real corpora, each with the counts that its README tells."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ismdata.convert.formats.registry import detect
from ismdata.convert.pipeline import convert
from ismdata.errors import DataError
from tests.support.paths import SHARED
from tests.support.records import read
from tests.support.shapes import A

DATA = SHARED / "data"
pytestmark = [
    pytest.mark.slow,  # converts whole corpora
    pytest.mark.skipif(not DATA.exists(), reason=f"the corpora are not here: {DATA}"),
]

#: Corpus, format, records, messages of all conversations written, refusals.
CORPORA = [
    ("dailydialog/train.zip", "dailydialog", 11_118, 87_171, {}),
    ("dailydialog/validation.zip", "dailydialog", 1_000, 8_069, {}),
    ("dailydialog/test.zip", "dailydialog", 1_000, 7_740, {}),
    ("dailydialog", "dailydialog", 13_118, 102_980, {}),
    ("kdconv", "kdconv", 900, 19_058, {}),
    ("lima/lima.json", "alpaca", 1_029, 2_164, {}),
    ("openai-messages/toy_chat_fine_tuning.jsonl", "messages", 10, 37, {}),
    ("openai-messages/weather_chat_fine_tuning.jsonl", "messages", 10, 60, {}),
    ("llamafactory/alpaca_en_demo.json", "alpaca", 999, 1_998, {}),
    ("llamafactory/alpaca_zh_demo.json", "alpaca", 1_000, 2_000, {}),
    ("llamafactory/identity.json", "alpaca", 91, 182, {}),
    ("llamafactory/history/oaast_sft_zh.json", "alpaca", 689, None, {}),
    ("llamafactory/history/self_cognition.json", "alpaca", 80, 160, {}),
    ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt", 300, None, {}),
    ("llamafactory/glaive_toolcall_zh_demo.json", "sharegpt", 300, None, {}),
    ("llamafactory/v1_sft_demo.jsonl", "messages", 500, 1_000, {}),
    ("llamafactory/reason_tool_use_demo_50.jsonl", "messages", 50, None, {}),
    ("lccc/LCCC-base_test.json", "lists", 10_000, 29_008, {}),
    ("lccc/toy_data.json", "lists", 1_400, 5_104, {}),
    ("fastchat/dummy_conversation.json", "sharegpt", 500, None, {}),
]


def table_of(folder):
    tables = []
    for path in sorted(folder.rglob("conversations-*.arrow")):  # a source of splits makes a folder for each
        with pa.ipc.open_stream(path) as stream:
            tables.append(stream.read_all())
    return pa.concat_tables(tables)


@pytest.mark.parametrize(
    ("name", "format", "records", "messages", "quarantined"), CORPORA, ids=[row[0] for row in CORPORA]
)
def test_counts(tmp_path, name, format, records, messages, quarantined):
    report = convert([str(DATA / name)], tmp_path / "out")
    assert {source.format for source in report.sources} == {format}
    assert (report.read, report.quarantined) == (records, quarantined)
    table = table_of(tmp_path / "out")
    assert len(table) == report.written == records - sum(quarantined.values())
    if messages is not None:
        assert pc.sum(pc.list_value_length(table["messages"])).as_py() == messages


def test_sharegpt_refuses_the_dirty_rows_and_keeps_the_others_word_for_word(tmp_path):
    path = DATA / "sharegpt" / "sharegpt_first5000.json.gz"
    report = convert([str(path)], tmp_path / "out")
    # The three empty answers of the README stand in one conversation; the 102 empty prompts are kept.
    assert report.quarantined == {"empty_answer": 1, "no_messages": 33}
    assert (report.read, report.written) == (5_000, 4_966)
    records = json.loads(gzip.decompress(path.read_bytes()))
    names = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "system": "system"}
    expected = []
    for number, record in enumerate(records, 1):
        turns = [(names[turn["from"]], turn["value"]) for turn in record["conversations"]]
        if turns and all(text.strip() for role, text in turns if role == "assistant"):
            expected.append((record["id"], f"{path}:record {number}", turns))
    found = [
        (row["id"], row["source"], [(message["role"], message["content"]) for message in row["messages"]])
        for row in table_of(tmp_path / "out").to_pylist()
    ]
    assert found == expected


def test_a_truncated_download_is_named_and_leaves_nothing(tmp_path):
    path = DATA / "sharegpt" / "sharegpt_head_truncated.json"
    with pytest.raises(
        DataError, match=r"end of the file at byte 1500000, inside record 220.*download may be incomplete"
    ):
        convert([str(path)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tool_conversations_keep_their_calls(tmp_path):
    path = DATA / "llamafactory" / "glaive_toolcall_en_demo.json"
    convert([str(path)], tmp_path / "out")
    records = json.loads(path.read_text(encoding="utf-8"))
    for row, record in zip(table_of(tmp_path / "out").to_pylist(), records, strict=True):
        tools = json.loads(record["tools"]) if record["tools"] else []
        assert [tool["function"] for tool in json.loads(row["tools"] or "[]")] == tools
        for message, turn in zip(row["messages"], record["conversations"], strict=True):
            if turn["from"] == "function_call":
                (call,) = json.loads(message["tool_calls"])
                found = json.loads(turn["value"])
                assert call["function"] == {"name": found["name"], "arguments": found["arguments"]}
                assert (message["role"], message["content"]) == ("assistant", None)
            else:
                assert message["content"] == turn["value"]


def test_labels_beside_the_text_go_to_meta(tmp_path):
    convert([str(DATA / "xdailydialog" / "en_dev_human.txt")], tmp_path / "out")
    table = table_of(tmp_path / "out")
    assert (len(table), pc.sum(pc.list_value_length(table["messages"])).as_py()) == (995, 8_025)
    assert {len(json.loads(meta)["labels"]) for meta in table["meta"].to_pylist()} == {3}


@pytest.mark.parametrize(
    ("path", "name", "messages", "assistants"),
    [
        ("esconv/FailedESConv.json", "utterances", 5_230, 2_377),
        ("taskmaster-4/data_00.json", "utterances", 1_883, None),
        ("firefly/dummy_data.jsonl", "pairs", 308, 154),
        ("mathdial/test.jsonl", "separated", 7_028, 1_259 + 952 + 890 + 598),
        ("lccc/toy_valid.txt", "tsv_pairs", 4_000, 2_000),
        ("xdailydialog/zh_dev_human.txt", "dailydialog", 8_025, None),
        ("llamafactory/dpo_zh_demo.json", "preference", 300 + 364, 300),
    ],
)
def test_counts_of_real_corpora(path, name, messages, assistants):
    text = (DATA / path).read_text("utf-8")
    if path.endswith(".json"):
        records = json.loads(text)
    else:
        lines = [line for line in text.split("\n") if line]
        records = [json.loads(line) for line in lines] if path.endswith(".jsonl") else lines
    assert detect(records[0]) == name
    found = [message for record in records for turns in read(name, record, preference="chosen") for message in turns]
    assert len(found) == messages
    assert assistants is None or sum(role == A for role, _ in found) == assistants
