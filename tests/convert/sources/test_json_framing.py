"""The framing of lines, arrays, splits and concatenated values, against `json.loads`."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.convert.formats.registry import detect
from ismdata.convert.sources import framing
from ismdata.convert.sources.detect_framing import detect_layout, skip_byte_order_mark
from ismdata.convert.sources.framing import ByteQueue, frame_document, frame_lines, frame_splits, frame_values
from ismdata.errors import DataError
from tests.convert.formats.test_fast_path import text
from tests.support.streams import ShortReads, queue_of


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
    queue = ByteQueue(ShortReads(blanks + dumped(records, layout) + blanks, size), "x.json")
    assert records_of(frame_document(queue)) == [(None, n, record) for n, record in enumerate(records, 1)]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(records=st.lists(values, max_size=3), layout=layouts, size=st.integers(1, 40))
def test_every_cut_of_an_array_is_found_out(records, layout, size):
    whole = dumped(records, layout)
    for cut in range(len(whole)):
        with pytest.raises(DataError, match=r"x\.json.*expected"):
            records_of(frame_document(ByteQueue(ShortReads(whole[:cut], size), "x.json")))


@settings(deadline=None, max_examples=150)
@given(
    splits=st.dictionaries(text, st.lists(values, max_size=3), min_size=1, max_size=3),
    layout=layouts,
    size=st.integers(1, 40),
)
def test_split_framing_finds_what_json_loads_finds(splits, layout, size):
    expected = [(name, n, record) for name, records in splits.items() for n, record in enumerate(records, 1)]
    assert records_of(frame_splits(ByteQueue(ShortReads(dumped(splits, layout), size), "x.json"))) == expected


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
    assert [record for *_, record in records_of(frame_values(ByteQueue(ShortReads(data, size), "x.json")))] == records


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.one_of(st.just(""), st.just(" " * 9), text), max_size=6),
    size=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_line_framing_numbers_lines_as_an_editor_does(lines, size, end):
    lines = [line.replace("\n", "").replace("\r", "") for line in lines]
    data = end.join(lines).encode()
    found = records_of(frame_lines(ByteQueue(ShortReads(data, size), "x.txt"), plain_text=True))
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
        records_of(frame_document(ByteQueue(ShortReads(b'["' + b"a" * 1000, 40), "x.json")))
    with pytest.raises(DataError, match=r"x\.json:1: the line is longer than 100 bytes"):
        records_of(frame_lines(ByteQueue(ShortReads(b"a" * 1000, 40), "x.json"), plain_text=True))


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


@pytest.mark.parametrize(
    "text", ['{"a":1},\n{"a":2},\n', '{"a":1},\n{"a":2}', '{"a":1}\n,\n{"a":2}\n', '{\n"a":1},{"a":2},']
)
def test_values_may_have_commas_between_them(text):
    queue = ByteQueue(io.BytesIO(text.encode()), "x")
    assert [record for _, _, record in records_of(frame_values(queue))] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ['{"a":1},,{"a":2}', ',{"a":1}', '{"a":1},,'])
def test_two_commas_are_an_error(text):
    with pytest.raises(DataError):
        records_of(frame_values(ByteQueue(io.BytesIO(text.encode()), "x")))


def test_lines_may_end_with_carriage_returns_alone():
    data = b'{"messages": [{"role": "user", "content": "q"}]}\r' * 3
    queue = queue_of(data)
    skip_byte_order_mark(queue)
    _, framing = detect_layout(queue, lambda record: detect(record) is not None)
    assert [number for _, number, _ in records_of(framing(queue))] == [1, 2, 3]


@pytest.mark.parametrize("text", ["[10:15] <bo> hi\n[10:16] <cy> yo\n", "[1. Kapitel] Hallo\n"])
def test_text_in_brackets_is_no_array(text):
    assert detect_layout(queue_of(text.encode()), lambda record: False)[0] == "text lines"
