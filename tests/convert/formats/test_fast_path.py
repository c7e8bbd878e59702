"""The fast path of each format, which parses a whole block, against the general one, record by record."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA
from ismdata.convert.columnar import WHITESPACE
from ismdata.convert.corpus_format import Place, SourceBlock
from ismdata.convert.formats.registry import FORMATS
from ismdata.convert.read_block import read_block, read_records
from ismdata.convert.sources.blocks import TableBlock
from ismdata.convert.sources.framing import line_block
from tests.support.records import RULES

PLACE = Place(prefix="corpus.jsonl:", stem="corpus")


# ---- records, mostly sound, some of them hostile ----


text = st.one_of(
    st.sampled_from(["", " ", " \n", "　", "Hello!", "2020-01-01", "1e5", "true", "你好", "a\u0000b", "\\", '"']),
    st.text(max_size=8),
)


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**30), st.floats(), st.just([]), st.just({}), st.just("\ud800"),
    st.just([{"type": "text", "text": "part"}]), st.just({"a": [1, {"b": None}]}), text,
)  # fmt: skip


role = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "GPT", "Human", "bing", "function_call", "narrator"]
)


def often(strategy, alternative=odd):
    return st.integers(0, 19).flatmap(lambda pick: alternative if pick == 0 else strategy)


def message(role_name, content_name):
    required = {content_name: often(text)} | ({role_name: often(role)} if role_name else {})
    fields = st.fixed_dictionaries(
        required,
        optional={
            "name": often(text), "train": often(st.booleans()), "weight": often(st.sampled_from([0, 0.5, -1, 1e300])),
            "tool_calls": st.none(), "function_call": st.none(), "tool_call_id": st.none(), "attrs": st.none(),
            "toxic": odd, "language": often(text), "thinking": st.sampled_from([None, "", "t"]),
            "text": st.sampled_from([None, "", "t"]), "parentId": st.sampled_from([None, "p", 1]), "id": odd,
            "is_bad": st.sampled_from([None, True, "0"]), "rating": st.sampled_from([None, "bad", 3]),
        },
    )  # fmt: skip
    return often(fields)


def listed(name, items):
    extras = {"id": often(text), "tools": st.sampled_from([None, "", "[]", "nonsense"]), "system": often(text)}
    # What real corpora hold beside.
    extras |= {
        "turn": odd,
        "conversation_id": often(text),
        "uuid": odd,
        "functions": st.sampled_from([None, "", [], 0]),
    }
    extras |= {"label": st.sampled_from([None, "", False, 1, "bad", "news"]), "rejected": st.sampled_from([None, "x"])}
    extras |= {"train": st.sampled_from([None, False, "x"]), "weight": st.sampled_from([None, 0, 2])}
    extras |= {"sys": st.sampled_from([None, "", "s", 3]), "persona": st.sampled_from(["You are s", "she"])}
    extras |= {"instruction": st.sampled_from([None, "", "Hello", "s"]), "score": st.floats()}
    extras |= {"system_prompt": st.sampled_from([None, "", "s", 0, []]), "images": st.sampled_from([None, [], ["x"]])}
    return st.fixed_dictionaries({name: often(st.lists(items, max_size=4))}, optional=extras)


pair = st.lists(often(text), min_size=2, max_size=2)


RECORDS = {
    "messages": listed("messages", message("role", "content")),
    "sharegpt": listed("conversations", message("from", "value")),
    "kdconv": listed("messages", message(None, "message")),
    "lists": st.lists(often(st.one_of(text, st.sampled_from(["user: a", "bot: b", "Ann: c", "http://d"]))), max_size=4),
    "alpaca": st.fixed_dictionaries(
        {"instruction": often(text), "output": often(text)},
        optional={
            "input": often(text), "system": often(text), "id": often(text), "tools": st.sampled_from([None, "", "[]"]),
            "history": often(st.lists(often(pair, st.lists(text)), max_size=3)),
        },
    ),
}  # fmt: skip


HOSTILE_LINES = [
    b'{"messages":[{"role":"user","content":"a"}],"messages":[]}',
    b'{"id":null,"id":"twice","messages":[{"role":"user","content":"a"}]}',
    b'{"messages":[{"role":"user","content":"a"}]}{"messages":[]}',
    b'{"messages":',
    b'[{"role":"user","content":"a"}]}',
    b'{"messages":[{"role":"user","content":"\xff"}]}',
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"messages":[{"role":"user","content":"a\tb"}]}',
    b'{"messages":[{"role":"assistant","content":"a","weight":NaN}]}',
    b'{"messages":[{"role":"assistant","content":"a","weight":1e999}]}',
    b'{"messages":[{"role":"assistant","content":"a","weight":' + b"9" * 5000 + b"}]}",
    b'{"messages":' + b"[" * 100_000,
    b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"x":' * 2000 + b"1" + b"}" * 2000,
    b'{"messages":[{"role":"user","content":"a"},]}',
    b"null",
    b'"text"',
    b"\x00",
    b'{"messages":[{"r\\u006fle":"user","content":"a"}]}',
    b'["a"]}{"messages":["b"]',
    b"  \t ",
    b"",
]


SOUND_LINES = {
    "messages": b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}',
    "sharegpt": b'{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}',
    "kdconv": b'{"messages":[{"message":"q"},{"message":"a"}]}',
    "lists": b'["q","a"]',
    "alpaca": b'{"instruction":"q","output":"a"}',
}


def assert_same(fast, general):
    fast.rows.validate(full=True)
    assert fast.rows.schema.equals(CONVERSATION_SCHEMA)
    assert fast.rows.to_pylist() == general.rows.to_pylist()
    assert list(map(repr, fast.quarantined)) == list(map(repr, general.quarantined))  # repr: NaN equals itself
    assert fast.ignored == general.ignored


def compare(block, name):
    fast = read_block(SourceBlock(block, PLACE, FORMATS[name]), RULES)
    general = read_records(SourceBlock(block, PLACE, FORMATS[name]), RULES)
    assert_same(fast, general)
    assert len(fast.rows) + len(fast.quarantined) == len(block.numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_both_paths_agree_on_lines(name, data):
    records = data.draw(st.lists(RECORDS[name], max_size=6))
    lines = [
        json.dumps(record, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass") for record in records
    ]
    for line in data.draw(st.lists(st.sampled_from([b"", b"  ", SOUND_LINES[name]]), max_size=2)):
        lines.insert(data.draw(st.integers(0, len(lines))), line)
    block, _ = line_block(data.draw(st.sampled_from([b"\n", b"\r\n"])).join(lines), 1)
    compare(block, name)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("hostile", HOSTILE_LINES, ids=lambda line: repr(line[:40]))
def test_both_paths_agree_on_a_hostile_line_among_sound_ones(name, hostile):
    sound = SOUND_LINES[name]
    block, _ = line_block(b"\n".join([sound, hostile, sound, hostile]), 1)
    compare(block, name)
    fast = read_block(SourceBlock(block, PLACE, FORMATS[name]), RULES)
    assert {"corpus.jsonl:1", "corpus.jsonl:3"} <= set(fast.rows["source"].to_pylist())


def test_rows_and_lines_stay_together_when_values_and_lines_do_not():
    """Three lines and three values, but no value is a line: counting alone would name the wrong places."""
    turn = b'{"role":"user","content":"a"}'
    whole = b'{"messages":[' + turn + b"]}"
    block, _ = line_block(b'{"messages":[\n' + turn + b"]}\n" + whole + whole, 1)
    compare(block, "messages")
    assert read_block(SourceBlock(block, PLACE, FORMATS["messages"]), RULES).rows.num_rows == 0


@pytest.mark.parametrize("pair", [["q"], ["q", "a", "x"], [], ["q", None, "a"], None])
def test_a_ragged_history_does_not_shift_its_neighbours(pair):
    records = [{"instruction": f"q{n}", "output": "a", "history": [["h", "b"]] * n} for n in range(3)]
    records.insert(1, {"instruction": "bad", "output": "a", "history": [["h", "b"], pair]})
    block, _ = line_block("\n".join(map(json.dumps, records)).encode(), 1)
    compare(block, "alpaca")
    refused = read_block(SourceBlock(block, PLACE, FORMATS["alpaca"]), RULES).quarantined
    assert [entry.source for entry in refused] == ["corpus.jsonl:2"]


@pytest.mark.parametrize("pair", [["q", None], ["q", ""], [" ", "a"], [None, "a"], ["", ""]])
def test_an_empty_side_of_a_history_does_not_shift_its_neighbours(pair):
    records = [{"instruction": f"q{n}", "output": "a", "history": [["h", "b"], pair] * (n % 2)} for n in range(4)]
    block, _ = line_block("\n".join(map(json.dumps, records)).encode(), 1)
    compare(block, "alpaca")


def test_a_sound_block_takes_the_fast_path():
    for name, sound in SOUND_LINES.items():
        block, _ = line_block(sound + b"\n" + sound + b"\n", 1)
        columns = FORMATS[name].parse_block(block)
        assert columns is not None and not columns.fallback.any(), name
        if name != "lists":
            rows = pa.Table.from_pylist([json.loads(sound)] * 2).slice(1)
            columns = FORMATS[name].parse_block(TableBlock(rows=rows, numbers=np.array([2])))
            assert columns is not None and not columns.fallback.any(), name


@pytest.mark.parametrize("table", [False, True])
def test_records_with_more_than_messages_take_the_fast_path(table):
    said = [{"role": "user", "content": "q", "toxic": False}, {"role": "assistant", "content": "a"}]
    record = {"conversation_id": "c", "conversation": said, "turn": 1, "language": "English", "system": None}
    if table:
        block = TableBlock(rows=pa.Table.from_pylist([record] * 3).slice(1), numbers=np.array([2, 3]))
    else:
        block, _ = line_block("\n".join([json.dumps(record)] * 2).encode(), 2)
    columns = FORMATS["messages"].parse_block(block)
    assert columns is not None and not columns.fallback.any()
    fast = read_block(SourceBlock(block, PLACE, FORMATS["messages"]), RULES)
    assert_same(fast, read_records(SourceBlock(block, PLACE, FORMATS["messages"]), RULES))
    assert fast.rows["id"].to_pylist() == ["c", "c"]
    assert json.loads(fast.rows["meta"][0].as_py()) == {"turn": 1, "language": "English"}
    assert fast.ignored == {"conversation[].toxic": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECORDS.keys() - {"lists"}))
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_both_paths_agree_on_tables(name, data):
    records = [
        record for record in data.draw(st.lists(RECORDS[name], min_size=1, max_size=6)) if isinstance(record, dict)
    ]
    try:
        rows = pa.Table.from_pylist(records)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeEncodeError):
        return  # Arrow cannot hold such a mixture, each kind with an error of its own: no table, nothing to compare
    cut = data.draw(st.integers(0, len(rows)))
    for part in (rows, rows.slice(cut), rows.slice(0, cut)):
        compare(TableBlock(rows=part, numbers=np.arange(1, len(part) + 1)), name)


def test_blank_means_what_str_strip_means():
    assert all(char.strip() == "" for char in WHITESPACE)
    assert len(WHITESPACE) == sum(chr(point).isspace() for point in range(0x110000))
