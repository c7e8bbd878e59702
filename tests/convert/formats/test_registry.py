"""The registry: what a record of each shape becomes, and that detection and documentation name its format."""

from __future__ import annotations

import copy
import json
import re

import pytest

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.formats.registry import FORMATS, detect
from tests.support.paths import ROOT
from tests.support.records import read
from tests.support.shapes import COVERED_FORMATS, QA, RECORDS, Q, R, S, chat, spoken

IDS = [f"{name}-{at}" for at, (name, *_) in enumerate(RECORDS)]


#: Records of the formats that tests/convert/formats/test_fast_path.py looks after.
OTHERS = [
    ("messages", {"messages": chat(*QA)}),
    ("messages", {"messages": chat((S, "s"), *QA)}),
    ("sharegpt", {"conversations": spoken("from", "value", ("human", Q), ("gpt", R))}),
    ("alpaca", {"instruction": Q, "input": "", "output": R, "history": [["b", "c"]]}),
    ("alpaca", {"instruction": f"Human:{Q}\nAssistant:{R}\nHuman:b\nAssistant:", "input": "", "output": "c"}),
    ("kdconv", {"name": "n", "messages": [{"message": "q"}, {"message": "a", "attrs": []}]}),
]


@pytest.mark.parametrize(("name", "record", "expected", "also"), RECORDS, ids=IDS)
def test_what_a_record_becomes(name, record, expected, also):
    before = copy.deepcopy(record)
    assert read(name, record, preference="chosen") == [expected]
    assert record == before


@pytest.mark.parametrize(("name", "record", "expected", "also"), RECORDS, ids=IDS)
def test_a_record_is_taken_for_its_own_format_only(name, record, expected, also):
    assert detect(record) == name
    assert {other for other, corpus_format in FORMATS.items() if corpus_format.matches(record)} == {name, *also}


@pytest.mark.parametrize(("name", "record"), OTHERS, ids=[f"{name}-{at}" for at, (name, _) in enumerate(OTHERS)])
def test_records_of_the_older_formats_fit_no_other(name, record):
    assert [other for other, corpus_format in FORMATS.items() if corpus_format.matches(record)] == [name]


NOTHING = [
    None, True, 3, 0.5, "", "Hello!", "1 day ago", "7\t12", "1\tnumbers only", [], {}, [[]], [{}], [["a"]],
    {"text": "Human: only one side"}, {"text": "Just words."}, {"conversation": "No speaker|EOM|here"},
    {"messages": []}, {"messages": [{"text": "q"}]}, {"turns": [{"speaker": "a"}]}, {"turns": [], "choices": []},
    {"content": [{"type": "text", "text": "q"}]}, {"log": [{"speaker": None, "text": "q"}]}, {"chat": {}},
    {"chosen": "a"}, {"label": True}, {"prompt": "q"}, {"prompt": "q", "completion": 3},
    {"question": "q", "answers": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize("record", NOTHING, ids=repr)
def test_what_is_no_conversation_is_taken_for_none(record):
    assert [name for name in COVERED_FORMATS if FORMATS[name].matches(record)] == []


# ---- documentation ----


SECTION = re.compile(r"^### `(\w+)`.*?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_documented_records_are_of_their_formats():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8").partition("\n## Roles")[0]
    found = SECTION.findall(text)
    assert set(COVERED_FORMATS) <= {name for name, *_ in found}
    for name, language, body in found:
        if language == "json" and name in {*COVERED_FORMATS, "messages", "sharegpt", "alpaca", "kdconv"}:
            record = json.loads(body)
            whole = detect(record) == name
            assert whole or {detect(one) for one in record} == {name}, name
        elif language == "text" and name in COVERED_FORMATS:
            assert detect(body.partition("\n")[0]) == name


def test_every_format_is_in_the_table_of_formats():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    cells = re.findall(r"^\| \[(`.+?`)\]\(#", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == set(FORMATS)


def test_the_documented_roles_are_those_of_the_table():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8").partition("\n## Roles")[2]
    rows = re.findall(r"^\| `(system|user|assistant|tool)` \| (`.*`) \|$", text, re.MULTILINE)
    assert {name: role for role, names in rows for name in re.findall(r"`(\w+)`", names)} == ROLE_NAMES
