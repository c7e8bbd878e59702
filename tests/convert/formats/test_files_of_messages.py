"""Pictures and files that belong to a message: the record is refused, since the text is only half of it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.support.converted import convert_files
from tests.support.exports import OPEN_WEBUI
from tests.support.shapes import CLAUDE, EXPORT, QA, Q, chat, spoken

FILE = [{"file_name": "a.txt", "extracted_content": "Long text"}]
FIRST, LAST = chat(*QA)
SAID = spoken("speaker", "text", ("Ann", Q), ("Bo", "Yes."))


def exported(**metadata):
    """A chat of ChatGPT whose question has this metadata."""
    record = json.loads(json.dumps(EXPORT))
    record["mapping"]["c"]["message"]["metadata"] = metadata
    return record


def in_webui(**more):
    """A chat of Open WebUI whose question has more fields."""
    record = json.loads(json.dumps(OPEN_WEBUI))
    record["chat"]["history"]["messages"]["a"] |= more
    return record


@pytest.mark.parametrize("name", ["attachments", "files", "images", "image", "audio", "experimental_attachments"])
@pytest.mark.parametrize("value", [FILE, "a.png", {"id": "7"}, [], None, "", {}])
def test_messages_with_files_are_refused(tmp_path, name, value):
    record = {"messages": [{**FIRST, name: value}, LAST]}
    found = convert_files(
        tmp_path, {"a.jsonl": "".join(f"{json.dumps(one)}\n" for one in (record, {"messages": chat(*QA)}))}
    )
    refused = [("unsupported_content", f"message 1 has {name}; expected text only")] if value else []
    assert (found.talks, found.refusals) == ([QA] * (1 if value else 2), refused)


@pytest.mark.parametrize(
    "record",
    [
        {"uuid": "u", "name": "n", "chat_messages": [{**CLAUDE[0], "attachments": FILE}, CLAUDE[1]]},
        {"uuid": "u", "name": "n", "chat_messages": [{**CLAUDE[0], "files": FILE}, CLAUDE[1]]},
        exported(attachments=[{"id": "f", "name": "a.pdf"}]),
        in_webui(files=[{"type": "file", "name": "a.pdf"}]),
        {"messages": [{**FIRST, "children": [LAST]}]},
        {"messages": [{"sender": "User", "text": Q, "children": [{"sender": "GPT", "text": "Yes."}]}]},
        {"dialogue": [{**SAID[0], "images": ["a.jpg"]}, SAID[1]]},
        {"conversations": [{"from": "human", "value": Q, "images": ["a.jpg"]}, {"from": "gpt", "value": "Yes."}]},
    ],
    ids=["claude attachments", "claude files", "chatgpt", "open webui", "tree", "librechat", "utterances", "sharegpt"],
)  # fmt: skip
def test_every_format_refuses_them(tmp_path, record):
    found = convert_files(tmp_path, {"a.jsonl": json.dumps(record), "b.jsonl": json.dumps({"messages": chat(*QA)})})
    assert found.talks == [QA]
    assert [reason for reason, _ in found.refusals] == ["unsupported_content"]


@pytest.mark.parametrize("wide", [False, True])
def test_tables_refuse_them_too(tmp_path, wide):
    rows = [{"messages": [{**FIRST, "images": ["a.png"]}, {**LAST, "images": []}]},
            {"messages": [{**one, "images": []} for one in (FIRST, LAST)]}]  # fmt: skip
    if wide:
        rows = [{**row, "score": at} for at, row in enumerate(rows)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = convert_files(tmp_path, {}, "a.parquet")
    assert found.talks == [QA]
    assert [reason for reason, _ in found.refusals] == ["unsupported_content"]


def test_mapped_messages_with_files_are_refused(tmp_path):
    (tmp_path / "my.toml").write_text('messages = "t"\nrole = "role"\ncontent = "content"')
    records = [{"t": [{**FIRST, "files": ["x"]}, LAST]}, {"t": [FIRST, LAST]}]
    found = convert_files(tmp_path, {"a.json": json.dumps(records)}, mapping=tmp_path / "my.toml")
    assert found.talks == [QA]
    assert [reason for reason, _ in found.refusals] == ["unsupported_content"]
