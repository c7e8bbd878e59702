"""The two roads give the same: every fast path against the record-by-record one, the framing against `json.loads`."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA, ROLE_NAMES
from ismdata.convert.canonical import Rules
from ismdata.convert.columnar import WHITESPACE
from ismdata.convert.corpus_format import Place, SourceBlock
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.convert.read_block import read_block, read_records
from ismdata.convert.sources import framing
from ismdata.convert.sources.blocks import TableBlock
from ismdata.convert.sources.detect_framing import detect_layout
from ismdata.convert.sources.framing import (
    ByteQueue,
    frame_document,
    frame_lines,
    frame_splits,
    frame_values,
    line_block,
)
from ismdata.errors import DataError

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
            "text": st.sampled_from([None, "", "t"]),
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
    extras |= {"system_prompt": st.sampled_from([None, "", "s", 0, []]), "images": st.sampled_from([None, [], ["x"]])}
    return st.fixed_dictionaries({name: often(st.lists(items, max_size=4))}, optional=extras)


pair = st.lists(often(text), min_size=2, max_size=2)

RECORDS = {
    "messages": listed("messages", message("role", "content")),
    "sharegpt": listed("conversations", message("from", "value")),
    "kdconv": listed("messages", message(None, "message")),
    "lists": st.lists(often(text), max_size=4),
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
    fast = read_block(SourceBlock(block, PLACE, FORMATS[name]), Rules(roles=ROLE_NAMES))
    general = read_records(SourceBlock(block, PLACE, FORMATS[name]), Rules(roles=ROLE_NAMES))
    assert_same(fast, general)
    assert len(fast.rows) + len(fast.quarantined) == len(block.numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_both_roads_agree_on_lines(name, data):
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
def test_both_roads_agree_on_a_hostile_line_among_sound_ones(name, hostile):
    sound = SOUND_LINES[name]
    block, _ = line_block(b"\n".join([sound, hostile, sound, hostile]), 1)
    compare(block, name)
    fast = read_block(SourceBlock(block, PLACE, FORMATS[name]), Rules(roles=ROLE_NAMES))
    assert {"corpus.jsonl:1", "corpus.jsonl:3"} <= set(fast.rows["source"].to_pylist())


def test_rows_and_lines_stay_together_when_values_and_lines_do_not():
    """Three lines and three values, but no value is a line: counting alone would name the wrong places."""
    turn = b'{"role":"user","content":"a"}'
    whole = b'{"messages":[' + turn + b"]}"
    block, _ = line_block(b'{"messages":[\n' + turn + b"]}\n" + whole + whole, 1)
    compare(block, "messages")
    assert read_block(SourceBlock(block, PLACE, FORMATS["messages"]), Rules(roles=ROLE_NAMES)).rows.num_rows == 0


@pytest.mark.parametrize("pair", [["q"], ["q", "a", "x"], [], ["q", None], None])
def test_a_ragged_history_does_not_shift_its_neighbours(pair):
    records = [{"instruction": f"q{n}", "output": "a", "history": [["h", "b"]] * n} for n in range(3)]
    records.insert(1, {"instruction": "bad", "output": "a", "history": [["h", "b"], pair]})
    block, _ = line_block("\n".join(map(json.dumps, records)).encode(), 1)
    compare(block, "alpaca")
    refused = read_block(SourceBlock(block, PLACE, FORMATS["alpaca"]), Rules(roles=ROLE_NAMES)).quarantined
    assert [entry.source for entry in refused] == ["corpus.jsonl:2"]


def test_a_sound_block_takes_the_fast_road():
    for name, sound in SOUND_LINES.items():
        block, _ = line_block(sound + b"\n" + sound + b"\n", 1)
        columns = FORMATS[name].parse_block(block)
        assert columns is not None and not columns.fallback.any(), name
        if name != "lists":
            rows = pa.Table.from_pylist([json.loads(sound)] * 2).slice(1)
            columns = FORMATS[name].parse_block(TableBlock(rows=rows, numbers=np.array([2])))
            assert columns is not None and not columns.fallback.any(), name


@pytest.mark.parametrize("table", [False, True])
def test_records_with_more_than_messages_take_the_fast_road(table):
    said = [{"role": "user", "content": "q", "toxic": False}, {"role": "assistant", "content": "a"}]
    record = {"conversation_id": "c", "conversation": said, "turn": 1, "language": "English", "system": None}
    if table:
        block = TableBlock(rows=pa.Table.from_pylist([record] * 3).slice(1), numbers=np.array([2, 3]))
    else:
        block, _ = line_block("\n".join([json.dumps(record)] * 2).encode(), 2)
    columns = FORMATS["messages"].parse_block(block)
    assert columns is not None and not columns.fallback.any()
    fast = read_block(SourceBlock(block, PLACE, FORMATS["messages"]), Rules(roles=ROLE_NAMES))
    assert_same(fast, read_records(SourceBlock(block, PLACE, FORMATS["messages"]), Rules(roles=ROLE_NAMES)))
    assert fast.rows["id"].to_pylist() == ["c", "c"]
    assert json.loads(fast.rows["meta"][0].as_py()) == {"turn": 1, "language": "English"}
    assert fast.ignored == {"conversation[].toxic": 2}


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(
        st.lists(st.one_of(text, st.sampled_from(["__eou__", " __eou__ ", "\t"])), max_size=6).map("".join), max_size=6
    )
)
@example(lines=["__eou__", "__eou__ a", "a __eou__ __eou__ b", " "])
def test_both_roads_agree_on_dailydialog(lines):
    data = "\n".join(line.replace("\n", " ").replace("\r", " ") for line in lines).encode("utf-8", "surrogatepass")
    block, _ = line_block(data, 1, plain_text=True)
    compare(block, "dailydialog")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECORDS.keys() - {"lists"}))
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_both_roads_agree_on_tables(name, data):
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


# ---- framing ----


class Dribble(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def __init__(self, data, size):
        super().__init__(data)
        self.size = size

    def read(self, size=-1):
        return super().read(self.size)


def records_of(framed):
    found = []
    for part in framed:
        numbers = part.block.numbers
        found += [(part.split, int(numbers[row]), part.block.record(row)) for row in range(len(numbers))]
    return found


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), text,
              st.text(alphabet='\\"[]{},\n', max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
layouts = st.sampled_from(
    [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (" , ", " : ")}, {"indent": 2, "ensure_ascii": False}]
)


def dumped(value, layout):
    return json.dumps(value, **layout).encode("utf-8")


@settings(deadline=None, max_examples=200)
@given(
    records=st.lists(values, max_size=6),
    layout=layouts,
    size=st.integers(1, 40),
    blanks=st.sampled_from([b"", b" \r\n"]),
)
def test_array_framing_finds_what_json_loads_finds(records, layout, size, blanks):
    queue = ByteQueue(Dribble(blanks + dumped(records, layout) + blanks, size), "x.json")
    assert records_of(frame_document(queue)) == [(None, n, record) for n, record in enumerate(records, 1)]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(records=st.lists(values, max_size=3), layout=layouts, size=st.integers(1, 40))
def test_every_cut_of_an_array_is_found_out(records, layout, size):
    whole = dumped(records, layout)
    for cut in range(len(whole)):
        with pytest.raises(DataError, match=r"x\.json.*expected"):
            records_of(frame_document(ByteQueue(Dribble(whole[:cut], size), "x.json")))


@settings(deadline=None, max_examples=150)
@given(
    splits=st.dictionaries(text, st.lists(values, max_size=3), min_size=1, max_size=3),
    layout=layouts,
    size=st.integers(1, 40),
)
def test_split_framing_finds_what_json_loads_finds(splits, layout, size):
    expected = [(name, n, record) for name, records in splits.items() for n, record in enumerate(records, 1)]
    assert records_of(frame_splits(ByteQueue(Dribble(dumped(splits, layout), size), "x.json"))) == expected


containers = st.one_of(st.lists(values, max_size=3), st.dictionaries(text, values, max_size=3))


@settings(deadline=None, max_examples=150)
@given(
    records=st.lists(containers, max_size=4),
    layout=layouts,
    size=st.integers(1, 40),
    between=st.sampled_from([b"", b"\n", b" \n\n"]),
)
def test_value_framing_finds_what_was_put_one_after_the_other(records, layout, size, between):
    data = between.join(dumped(record, layout) for record in records)
    assert [record for *_, record in records_of(frame_values(ByteQueue(Dribble(data, size), "x.json")))] == records


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.one_of(st.just(""), st.just(" " * 9), text), max_size=6),
    size=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_line_framing_numbers_lines_as_an_editor_does(lines, size, end):
    lines = [line.replace("\n", "").replace("\r", "") for line in lines]
    data = end.join(lines).encode()
    found = records_of(frame_lines(ByteQueue(Dribble(data, size), "x.txt"), plain_text=True))
    stripped = [(n, line.strip(" \t\r\n")) for n, line in enumerate(lines, 1)]
    assert [(number, line) for _, number, line in found] == [(n, line) for n, line in stripped if line]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1} {"a": 2}]', "record 1"),
        (b'[{"a": 1},, {"a": 2}]', r"expected record 2"),
        (b'[{"a": 1},]', r"expected record 2"),
        (b'[{"a": 1}, {"a": 2}}', r"found '}' at byte 20"),
        (b'[{"a": 1}, {"a": [2}]]', r"record 2"),
        (b'[{"a": 1}] junk', r"found 'junk' at byte 12"),
        (b'[{"a": 1}, {"a": "x\ny"}]', r"record 2: found a line break inside a string at byte 20"),
        (b'[{"a": 1}, {"a": "x}]', r"end of the file at byte 21, inside record 2"),
    ],
)  # fmt: skip
def test_broken_arrays_name_the_place(data, message):
    with pytest.raises(DataError, match=rf"^x\.json:.*{message}"):
        records_of(frame_document(ByteQueue(io.BytesIO(data), "x.json")))


def test_a_long_run_of_backslashes_is_read_in_one_go():
    value = ["\\" * 200_001 + '"', "a,b"]
    assert [
        record for *_, record in records_of(frame_document(ByteQueue(io.BytesIO(json.dumps(value).encode()), "x")))
    ] == value


def test_a_record_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(framing, "MAX_RECORD_BYTES", 100)
    with pytest.raises(DataError, match=r"x\.json: the record at byte 2 is longer than 100 bytes"):
        records_of(frame_document(ByteQueue(Dribble(b'["' + b"a" * 1000, 40), "x.json")))
    with pytest.raises(DataError, match=r"x\.json:1: the line is longer than 100 bytes"):
        records_of(frame_lines(ByteQueue(Dribble(b"a" * 1000, 40), "x.json"), plain_text=True))


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        (b'{"messages": []}\n{"messages": []}\n', "JSON Lines"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "JSON Lines"),
        (b'{"history": [["a", "b"]], "instruction": "c", "output": "d"}', "JSON Lines"),
        (b'{"messages": [}\n{"messages": []}\n', "JSON Lines"),
        (b"junk\n{}\n", "JSON Lines"),
        (b'["a", "b"]\n["c", "d"]\n', "JSON Lines"),
        (b'[{"role": "user", "content": "a"}]\n[{"role": "user", "content": "b"}]\n', "JSON Lines"),
        (b'[["a", "b"], ["c"]]', "a JSON array"),
        (b'[\n  {\n "messages": []', "a JSON array"),
        (b"[]", "a JSON array"),
        (b'[{"role": "user", "content": "a"}]', "JSON Lines"),
        (b'[\n{"role": "user", "content": "a"}]', "JSON values"),
        (b" [", "a JSON array"),
        (b'{"train": [["a", "b"]], "valid": []}', "an object of splits"),
        (b'{\n"valid": [\n[\n"a",\n"b"\n]\n]}', "an object of splits"),
        (b'{\n  "messages": [\n    {"role": "user"', "JSON values"),
        (b'["a",\n "b"]', "JSON values"),
        (b"[laughs] Hello ! __eou__ Hi ! __eou__\n", "text lines"),
        (b"{smile} Hello ! __eou__\n", "text lines"),
        (b"Hello ! __eou__ Hi ! __eou__\n", "text lines"),
    ],
)
def test_layouts(head, layout):
    queue = ByteQueue(io.BytesIO(head), "x")
    queue.more()
    assert detect_layout(queue, lambda record: detect(record) is not None)[0] == layout
