"""Values that JSON does not have, where records hold them: NaN and bytes."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.json_values import json_text, parse_json, parse_record_json, without_nan
from tests.support.one_corpus import convert_text, lines
from tests.support.records import read
from tests.support.shapes import QA, A, Q, R, U, chat

NAN, INFINITY = float("nan"), float("inf")
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "weight"]), inner, max_size=2),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_records_are_read_as_without_nan_says(value):
    text = json.dumps(value)
    assert json.dumps(parse_record_json(text)) == json.dumps(without_nan(json.loads(text)))
    json_text(without_nan(value, used=frozenset()), "the value")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_strict_json_has_no_nan(text):
    with pytest.raises(ValueError, match="is not JSON"):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["[NaN", '"NaN', "[NaN]" + "]", '{"a": NaN, "b": ' + "9" * 5000 + "}", "[" * 900 + "NaN"]
)
def test_broken_records_stay_broken(text):
    with pytest.raises(ValueError):
        parse_record_json(text)


def test_nan_beside_a_conversation_is_null(tmp_path):
    messages = chat(*QA)
    text = lines({"messages": messages}, {"messages": messages, "score": NAN, "n": [1, -INFINITY], "system": NAN})
    found = convert_text(tmp_path, text + '{"messages": [{"role": "user", "content": "q"}], "score": 1e999, "x": 1}\n')
    assert found.turns == [QA, QA, [(U, "q")]]
    assert [row["meta"] and json.loads(row["meta"]) for row in found.rows] == [None, {"n": [1, None]}, {"x": 1}]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_weight_that_is_no_number_is_refused(tmp_path, value):
    sound = lines({"messages": chat(*QA)})
    found = convert_text(tmp_path, sound + sound.replace("}]}", f', "weight": {value}}}], "score": NaN}}') + sound)
    assert (len(found.rows), found.reasons) == (2, ["invalid_field"])
    table = pa.table({"messages": [[{"role": A, "content": "a", "weight": w}] for w in (1.0, NAN)], "n": [1, 2]})
    assert convert_text(tmp_path, table).reasons == ["invalid_field"]


def test_bytes_are_text_or_refused_by_name(tmp_path):
    table = pa.table({
        "prompt": pa.array(["Ä".encode(), b"\xff\xfe", b"q"], pa.binary()), "completion": [b"a", b"b", b"c"],
        "hash": pa.array([b"\xff\x00", None, b"x"], pa.large_binary()),
    })  # fmt: skip
    found = convert_text(tmp_path, table)
    assert found.turns == [[(U, "Ä"), (A, "a")], [(U, "q"), (A, "c")]]
    assert [json.loads(row["meta"]) for row in found.rows] == [{"hash": "/wA="}, {"hash": "x"}]
    ((entry),) = found.quarantine
    assert entry["reason"] == "invalid_field"
    assert "prompt is bytes that are not UTF-8" in entry["detail"]
    assert entry["record"]["prompt"] == "//4="


def test_bytes_in_messages(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())]))
    messages = [[{"role": U, "content": Q.encode()}, {"role": A, "content": text}] for text in (R.encode(), b"\xff")]
    found = convert_text(tmp_path, pa.table({"messages": pa.array(messages, kind), "n": [1, 2]}))
    assert found.turns == [QA]
    assert found.reasons == ["invalid_content"]


@pytest.mark.parametrize(("pieces", "text"), [
    (["One.", "Two."], "One.\nTwo."), (["One.", " Two.", "\nThree."], "One. Two.\nThree."),
    (["One.\n", "Two."], "One.\nTwo."), (["One."], "One."),
    (["", "One.", ""], "One."), (["一。", "二。"], "一。\n二。"),
])  # fmt: skip
def test_texts_in_a_list_are_kept_apart(pieces, text):
    assert read("messages", {"messages": [{"role": U, "content": pieces}]}) == [[(U, text)]]


def test_typed_parts_are_joined_as_their_apis_do():
    parts = [{"type": "text", "text": "The sky is "}, {"type": "text", "text": "blue"}, {"type": "text", "text": "."}]
    assert read("messages", {"messages": [{"role": U, "content": parts}]}) == [[(U, "The sky is blue.")]]
