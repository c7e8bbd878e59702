"""Layouts beyond lines and arrays: objects by id, tables, YAML, and what tells them apart; cuts never make up records.

The framing of lines, arrays, splits and values is tested in `test_json_framing.py`.
"""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ismdata.convert.sources import delimited as rows
from ismdata.convert.sources import framing
from ismdata.convert.sources.blocks import with_key
from ismdata.convert.sources.delimited import column_names, frame_rows
from ismdata.convert.sources.detect_framing import LINE_LAYOUTS, detect_layout, skip_byte_order_mark
from ismdata.convert.sources.framing import frame_entries, frame_splits
from ismdata.errors import DataError, Refused
from tests.support.streams import queue_of

yaml = pytest.importorskip("yaml")


def is_record(value):
    """A stand-in for detection: pairs, lists of texts, lists of messages, and objects that hold one."""
    if isinstance(value, dict):
        return {"q", "a"} <= value.keys() or ("messages" in value and is_record(value["messages"]))
    if isinstance(value, str):
        return "\t" in value
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) or "text" in one for one in value)


def read(data, size=1 << 20, name="x"):
    """Layout, and (number, record or reason) for each record, as `convert` goes about it."""
    queue = queue_of(data, size, name)
    skip_byte_order_mark(queue)
    layout, frame = detect_layout(queue, is_record)
    return layout, records_of(frame(queue))


def records_of(framed):
    found = []
    for part in framed:
        for row, number in enumerate(part.block.numbers.tolist()):
            found.append((number, record_or_reason(part.block, row)))
    return found


def record_or_reason(block, row):
    try:
        return block.record(row)
    except Refused as refusal:
        assert json.dumps(block.raw(row))
        return refusal.reason


text = st.one_of(
    st.sampled_from(["", " ", "a,b", 'say "hi"', "two\nlines", "\r\n", "{", "}", "\\", "你好", "\t"]), st.text()
)
dumped_as = st.sampled_from([{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (" , ", " : ")}])
plain = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=6)
values = st.recursive(
    st.one_of(st.none(), st.integers(), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
sizes = st.integers(1, 40)


# ---- objects of records by id ----


@settings(deadline=None, max_examples=100)
@given(
    entries=st.dictionaries(text, st.dictionaries(text, values, max_size=3), max_size=4), size=sizes, layout=dumped_as
)
def test_entry_framing_finds_what_json_loads_finds(entries, size, layout):
    data = json.dumps(entries, **layout).encode("utf-8", "backslashreplace")
    loaded = json.loads(data)
    expected = [(n, with_key(key, value)) for n, (key, value) in enumerate(loaded.items(), 1)]
    assert records_of(frame_entries(queue_of(b"\r\n" + data + b" ", size))) == expected


@settings(deadline=None, max_examples=15)
@given(entries=st.dictionaries(text, values, max_size=3), size=st.sampled_from([11, 1000]))
def test_every_cut_of_an_object_by_id_is_found_out(entries, size):
    whole = json.dumps(entries).encode()
    for cut in range(len(whole)):
        with pytest.raises(DataError, match=r"^x.*expected"):
            records_of(frame_entries(queue_of(whole[:cut], size)))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("k", {"q": 1}, {"id": "k", "q": 1}),
        ("k", {"id": None, "q": 1}, {"id": "k", "q": 1}),
        ("k", {"id": "k", "q": 1}, {"id": "k", "q": 1}),
        ("7", {"uuid": 7}, {"uuid": 7}),
        ("k", {"dialogue_id": "other"}, {"dialogue_id": "other", "key": "k"}),
        ("k", {"id": "other", "key": 1}, {"id": "other", "key": 1}),
        ("k", [{"text": "q"}], {"id": "k", "messages": [{"text": "q"}]}),
        ("k", None, None),
    ],
)
def test_how_a_key_travels(key, value, expected):
    assert with_key(key, value) == expected


def test_a_repeated_key_is_two_records():
    data = b'{"d1": {"q": 1, "a": 2}, "d1": {"q": 3, "a": 4}}'
    assert [record["q"] for _, record in records_of(frame_entries(queue_of(data)))] == [1, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"d1": {}, {"q": 1}}', r"x:record 2: .*expected an entry"),
        (b'{"d1": {}, "d2"}', r"x:record 2: .*expected an entry"),
        (b'{"d1": {},, "d2": {}}', "expected record 2"),
        (b'{"d1": {}]', r"found '\]' at byte 10; expected '}'"),
        (b'{"d1": {}} junk', "after the end of the JSON"),
        (b'{"d1": {}, "d2": {"a": "x}}', "inside record 2.*download may be incomplete.*Or a closing quote"),
        (b'{"d1": {"a": "\xff"}}', None),
    ],
)
def test_broken_objects_by_id(data, message):
    if message is None:
        assert records_of(frame_entries(queue_of(data))) == [(1, "not_utf8")]
        return
    with pytest.raises(DataError, match=message):
        records_of(frame_entries(queue_of(data)))


def test_the_first_entry_may_be_larger_than_what_is_read_at_once(monkeypatch):
    entries = {f"d{n}": {"q": "x" * 5000, "a": "y"} for n in range(3)}
    for size in (100, 1000, 7000):
        layout, found = read(json.dumps(entries, indent=1).encode(), size)
        assert (layout, len(found)) == ("an object of records", 3)


# ---- tables ----


def written(names, table, *, delimiter=",", end="\r\n", quoting=csv.QUOTE_MINIMAL):
    target = io.StringIO()
    writer = csv.writer(target, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(names)
    writer.writerows(table)
    return target.getvalue().encode("utf-8")


cell = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6)


@settings(deadline=None, max_examples=200)
@given(
    table=st.lists(st.lists(cell, min_size=3, max_size=3), max_size=6),
    delimiter=st.sampled_from(list(rows.DELIMITERS)),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    size=sizes,
    last=st.booleans(),
)
def test_row_framing_finds_what_the_csv_module_finds(table, delimiter, end, quoting, size, last):
    data = written(["q", "a", "n"], table, delimiter=delimiter, end=end, quoting=quoting)
    data = data if last else data.removesuffix(end.encode())
    expected, line = [], 2
    for cells in table:
        if any(one.strip() for one in cells):
            expected.append((line, dict(zip(["q", "a", "n"], cells, strict=True))))
        line += written(cells, [], delimiter=delimiter, end=end, quoting=quoting).count(b"\n")
    assert records_of(frame_rows(queue_of(data, size), delimiter=delimiter)) == expected


def test_rows_that_do_not_fit_are_refused_where_they_stand():
    data = b'q,a\r\n1,2\n3\n4,5,6\n\n,\n"7\n7",8\n\xff,9\n10,11'
    expected = [
        (2, {"q": "1", "a": "2"}),
        (3, "invalid_row"),
        (4, "invalid_row"),
        (7, {"q": "7\n7", "a": "8"}),
        (9, "not_utf8"),
        (10, {"q": "10", "a": "11"}),
    ]
    for size in (1, 3, 1000):
        assert records_of(frame_rows(queue_of(data, size), delimiter=",")) == expected
    (block,) = [part.block for part in frame_rows(queue_of(data), delimiter=",")]
    assert [block.raw(row) for row in (1, 2, 4)] == [["3"], ["4", "5", "6"], {"q": "\\xff", "a": "9"}]


def test_cells_of_any_length():
    long = "long " * 100_000
    data = written(["q", "a"], [[long, "a"]] * 20)
    assert records_of(frame_rows(queue_of(data), delimiter=",")) == [(n, {"q": long, "a": "a"}) for n in range(2, 22)]
    assert len(list(frame_rows(queue_of(data), delimiter=","))) > 1


@pytest.mark.parametrize("data", [b'q,a\n1,2\n"3,4\n5,6\n', b'q,a\n1,2\n"3"x,4\n'])
def test_a_broken_quote_is_an_error_of_the_table(data):
    with pytest.raises(DataError, match=r"^x:3: found a broken row .*expected quotes around cells in pairs"):
        records_of(frame_rows(queue_of(data), delimiter=","))


def test_column_names_are_all_there_and_all_different():
    assert column_names(["a", " a ", "", "a (2)", ""]) == ["a", "a (2)", "column 3", "a (2) (2)", "column 5"]


@settings(deadline=None, max_examples=40)
@given(table=st.lists(st.lists(plain, min_size=2, max_size=2), min_size=1, max_size=4))
def test_a_cut_table_gives_its_whole_rows_or_an_error(table):
    """All cells quoted. Where the last cell is not, a cut inside it cannot show, in no format that ends on a line."""
    whole = written(["q", "a"], table, quoting=csv.QUOTE_ALL)
    complete = records_of(frame_rows(queue_of(whole), delimiter=","))
    for cut in range(len(whole)):
        if whole[:cut].endswith(b'"') and whole[cut : cut + 1] == b'"':
            continue  # inside a doubled quote: for all one can tell, the cell's end
        try:
            found = records_of(frame_rows(queue_of(whole[:cut]), delimiter=","))
        except DataError:
            continue
        if whole[:cut].endswith(b","):
            found = found[:-1]  # ends in an empty cell, for all one can tell
        kept = [entry for entry in found if entry[1] != "invalid_row"]
        assert kept == complete[: len(kept)]
        assert len(found) - len(kept) <= 1


# ---- which layout ----

RECORD = {"q": "1", "a": "2"}


@pytest.mark.parametrize(
    ("data", "name", "layout", "count"),
    [
        (json.dumps({"d1": RECORD, "d2": RECORD}), "x", "an object of records", 2),
        (json.dumps({"d1": RECORD, "d2": RECORD}, indent=1), "x", "an object of records", 2),
        (json.dumps({"d1": RECORD}), "x", "an object of records", 1),
        (json.dumps({"ann": RECORD, "bob": RECORD, "cy": RECORD}), "x", "an object of records", 3),
        (json.dumps({"d1": {"broken": []}, "d2": RECORD}), "x", "an object of records", 2),
        (json.dumps({"d1": {"log": [1]}, "d2": {"log": []}}), "x", "an object of records", 2),
        (json.dumps({"d1": [{"text": "q"}], "d2": [{"text": "q"}]}), "x", "an object of records", 2),
        (json.dumps({"chosen": RECORD, "rejected": RECORD}), "x", "JSON Lines", 1),
        (json.dumps({"chosen": [{"text": "q"}], "rejected": [{"text": "q"}]}, indent=1), "x", "JSON values", 1),
        (json.dumps({"question": ["q1", "q2"], "answer": ["a1", "a2"]}), "x", "JSON Lines", 1),
        (json.dumps({"q": {"1": RECORD}, "a": "2"}), "x", "JSON Lines", 1),
        (json.dumps({"q": {"turn_1": RECORD}, "a": {}}, indent=1), "x", "JSON values", 1),
        (json.dumps({"d1": RECORD}) + "\n" + json.dumps({"d2": RECORD}), "x", "JSON Lines", 2),
        (json.dumps({"messages": {"1": RECORD}}), "x", "JSON Lines", 1),
        (json.dumps({"train": [RECORD], "test": [RECORD]}), "x", "an object of splits", 2),
        (json.dumps({"messages": []}), "x", "JSON Lines", 1),
        ("q,a\n1,2\n", "x", "CSV", 1),
        ("\ufeffq;a;n\r\n1;2;3\r\n", "x", "CSV with semicolons", 1),
        ("n\tq\ta\n1\t2\t3\n", "x", "TSV", 1),
        ("n|q|a\n1|2|3\n", "x", "CSV with bars", 1),
        ('q,a\n"{""json"": 1}\n{""json"": 2}",2\n', "x", "CSV", 1),
        ("u,v\n1,2\n", "x.csv", "CSV", 1),
        ("u,v\n1,2\n", "x.zip!deep/x.CSV.gz", "CSV", 1),
        ("u,v\n1,2\n", "x.txt", "text lines", 2),
        ("hello\tworld\nhow\tnow\n", "x.tsv", "text lines", 2),
        ('[["q", "a"]]', "x.csv", "a JSON array", 1),
        ("categories:\n- c\nconversations:\n- - q\n  - a\n- - b\n", "x", "YAML", 2),
        ("# talk\n---\n- - q\n  - a\n", "x", "YAML", 1),
        ("- q: 1\n  a: 2\n- q: 3\n  a: 4\n", "x.yaml", "YAML", 2),
        ("- Hello !\n- Hi !\n", "x.txt", "text lines", 2),
        ('[["q", "a"]]', "x.yml", "a JSON array", 1),
        ("Note: this is talk\n", "x.txt", "text lines", 1),
    ],
)
def test_layouts(data, name, layout, count):
    found, records = read(data.encode("utf-8"), name=name)
    assert (found, len(records)) == (layout, count)


def test_line_layouts_are_those_whose_numbers_are_lines():
    assert {"JSON Lines", "text lines", "CSV", "TSV", "CSV with semicolons", "CSV with bars"} == LINE_LAYOUTS


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ('{"a": 1}'.encode("utf-32"), "UTF-32"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"\x00\x00\xfe\xff" + '{"a": 1}'.encode("utf-32-be"), "UTF-32"),
        ('[{"a": 1}]'.encode("utf-16-le"), "UTF-16 or UTF-32"),
        ('{"a": 1}'.encode("utf-32-be"), "UTF-16 or UTF-32"),
        (b"Rar!\x1a\x07\x00", "a RAR archive"),
    ],
)
def test_other_encodings_are_called_by_their_names(data, found):
    with pytest.raises(DataError, match=rf"^x: found {found}; expected UTF-8"):
        read(data)


# ---- cuts ----

DOCUMENTS = {
    "lines": b"\n".join(json.dumps({"q": f"{n} \\", "a": "2"}).encode() for n in range(3)) + b"\n",
    "array": json.dumps([{"q": f"{n} \\", "a": "2"} for n in range(3)], indent=1).encode(),
    "entries": json.dumps({f"d{n}": {"q": f"{n} \\", "a": "2"} for n in range(3)}, indent=1).encode(),
    "splits": json.dumps({"train": [RECORD, RECORD], "test": [RECORD]}, indent=1).encode(),
    "one": json.dumps({"q": {"turn_1": RECORD}, "a": "2"}, indent=1).encode(),
    "values": b"\n".join(json.dumps({"q": f"{n} \\", "a": "2"}, indent=1).encode() for n in range(3)),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("size", [3, 1000])
def test_no_cut_of_a_json_file_makes_up_a_record(kind, size):
    """Each cut is refused as a whole, or gives whole records first and then at most a broken line."""
    whole = DOCUMENTS[kind]
    _, complete = read(whole)
    for cut in range(len(whole)):
        try:
            _, found = read(whole[:cut], size)
        except DataError:
            continue
        kept = [record for _, record in found if record != "invalid_json"]
        assert kept == [record for _, record in complete][: len(kept)]
        assert len(found) - len(kept) <= 1


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=60), size=sizes, name=st.sampled_from(["x", "x.csv", "x.yaml"]))
@example(data=b'{"d1":{},"d1":[{"":"', size=1, name="x")
@example(data=b"---\n- - \n  - ", size=1, name="x")
def test_any_bytes_are_read_or_refused(data, size, name):
    try:
        read(data, size, name)
    except DataError as error:
        assert str(error).startswith(name)


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(sorted(DOCUMENTS)),
    at=st.integers(0, 10**6),
    put=st.sampled_from([b"", b'"', b"{", b"]", b",", b"\\", b"\n", b"\0", b"\xff"]),
)
def test_damaged_json_is_read_or_refused(kind, at, put):
    whole = DOCUMENTS[kind]
    at %= len(whole)
    try:
        read(whole[:at] + put + whole[at + 1 :])
    except DataError as error:
        assert str(error).startswith("x")


@pytest.mark.parametrize("name", [b'"t\\ain"', b'"\xff"', b'"a\tb"'], ids=["escape", "utf-8", "control"])
def test_broken_names_of_splits_are_refused(name):
    with pytest.raises(DataError, match=r"^x: found the broken name .* at byte 2"):
        records_of(frame_splits(queue_of(b"{" + name + b': [["q"]]}')))


def test_names_of_splits_can_be_written_whatever_they_hold():
    (part,) = frame_splits(queue_of(b'{"\\ud800": [["q"]]}'))
    assert part.split == "\\ud800"


@settings(deadline=None, max_examples=300)
@given(text=st.text(alphabet='\\\\"[]{},\n a', max_size=30), window=st.integers(1, 9))
@example(text='"\\\\\\\\\\"",', window=3)
def test_structure_does_not_depend_on_the_windows(text, window):
    """The oracle goes from byte to byte."""
    inside, escaped, depth, broken = False, False, 0, -1
    expected = []
    for place, char in enumerate(text):
        if char == '"' and not escaped:
            inside = not inside
        elif inside:
            broken = place if char == "\n" and broken < 0 else broken
        elif char in "[]{},\n":
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(char, 0)
            if depth <= 0 or char == "\n":
                expected.append((place, char, depth))
        escaped = char == "\\" and not escaped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "_WINDOW", window)
        found = framing._scan(np.frombuffer(text.encode(), np.uint8))
    places = zip(found.places.tolist(), map(chr, found.bytes.tolist()), found.depth.tolist(), strict=True)
    assert (list(places), found.broken) == (expected, broken)


def test_a_line_without_end_is_refused_in_tables_too(monkeypatch):
    monkeypatch.setattr(rows, "MAX_RECORD_BYTES", 100)
    assert framing.MAX_RECORD_BYTES > 100
    with pytest.raises(DataError, match="a line is longer than 100 bytes"):
        records_of(frame_rows(queue_of(b"q,a\n" + b"x" * 1000, 40), delimiter=","))


def test_the_cell_limit_of_the_process_does_not_change_what_a_table_is():
    data = b"q,a\n" + b"x" * 200_000 + b",y\n"
    csv.field_size_limit(131_072)  # the library's default, until the first table is read
    assert read(data) == read(data) == ("CSV", [(2, {"q": "x" * 200_000, "a": "y"})])
