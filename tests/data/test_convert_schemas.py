"""The published schemas match what `convert` writes and what the code defines."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from jsonschema import Draft202012Validator, ValidationError

from ismdata.conversation import CONVERSATION_SCHEMA, MESSAGE_TYPE, REASONS, ROLES
from ismdata.convert.pipeline import convert
from tests.support.paths import SCHEMAS


def schema(name):
    found = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("schemas")
    call = {"function": {"name": "clock", "arguments": "{}"}}
    records = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 0.5, "mood": 1},
            ]
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}], "topic": "time"},
        {"messages": [{"role": "narrator", "content": "q"}]},
    ]
    path = base / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\nbroken\n")
    convert([str(path)], base / "out", roles={"bot": "assistant"})
    return base / "out"


def test_the_arrow_schema_is_the_published_one(folder):
    text = "".join(
        f"{field.name}: {field.type}{'' if field.nullable else ' not null'}\n" for field in CONVERSATION_SCHEMA
    )
    assert (SCHEMAS / "conversations.arrow.txt").read_text(encoding="utf-8") == text
    with pa.ipc.open_stream(folder / "conversations-00000.arrow") as stream:
        assert stream.schema.equals(CONVERSATION_SCHEMA)


def test_conversations_match_their_schema(folder):
    published = schema("conversation")
    assert list(published["properties"]) == CONVERSATION_SCHEMA.names
    message = published["$defs"]["message"]
    assert list(message["properties"]) == message["required"] == [field.name for field in MESSAGE_TYPE]
    assert message["properties"]["role"]["enum"] == list(ROLES)
    with pa.ipc.open_stream(folder / "conversations-00000.arrow") as stream:
        rows = stream.read_all().to_pylist()
    assert len(rows) == 2
    for row in rows:
        Draft202012Validator(published).validate(row)
    with pytest.raises(ValidationError):
        Draft202012Validator(published).validate({**rows[0], "messages": []})


def test_quarantine_lines_match_their_schema(folder):
    published = schema("quarantine")
    assert published["properties"]["reason"]["enum"] == list(REASONS)
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["reason"] for line in lines] == ["unknown_role", "invalid_json"]
    for line in lines:
        Draft202012Validator(published).validate(line)


def test_the_index_matches_its_schema(folder):
    published = schema("conversations_index")
    assert published["properties"]["counts"]["properties"]["quarantined"]["propertyNames"]["enum"] == list(REASONS)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    Draft202012Validator(published).validate(index)
    assert index["ignored_fields"] == {"messages[].mood": 1}
    assert list(index) == list(published["properties"])
