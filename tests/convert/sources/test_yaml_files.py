"""YAML documents to records."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.convert.sources import yaml_files
from ismdata.convert.sources.yaml_files import frame_yaml, parse_documents
from ismdata.errors import DataError
from tests.convert.sources.test_framing import is_record as is_record
from tests.convert.sources.test_framing import records_of as records_of
from tests.convert.sources.test_framing import sizes as sizes
from tests.convert.sources.test_framing import text as text
from tests.convert.sources.test_framing import yaml as yaml
from tests.support.streams import queue_of

# ---- YAML ----

scalar = st.one_of(
    st.sampled_from(["yes", "no", "null", "~", "007", "1.5", "a: b", "- x", "#", "&a", "*a", "!!int 3", "{"]),
    st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=6),
)
nested = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalar, inner, max_size=3), max_leaves=8
)


@settings(deadline=None, max_examples=150)
@given(
    talks=st.lists(st.one_of(st.lists(scalar, min_size=1, max_size=3), scalar.filter(bool)), max_size=4),
    field=st.booleans(),
    size=sizes,
    flow=st.booleans(),
)
def test_yaml_framing_finds_what_the_library_finds(talks, field, size, flow):
    document = {"categories": ["c"], "conversations": talks} if field else talks
    data = yaml.safe_dump(document, allow_unicode=True, default_flow_style=flow).encode("utf-8")
    loaded = yaml.load(data, Loader=yaml.BaseLoader)
    expected = loaded["conversations"] if field else loaded
    assert expected == talks
    found = records_of(frame_yaml(queue_of(data, size), is_record=lambda value: isinstance(value, list)))
    assert found == list(enumerate(talks, 1))


@settings(deadline=None, max_examples=150)
@given(value=nested)
def test_yaml_values_are_those_of_the_library(value):
    data = yaml.safe_dump(value, allow_unicode=True).encode("utf-8")
    assert parse_documents(data, "x") == [yaml.load(data, Loader=yaml.BaseLoader)] == [value]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"- &a [x]\n- *a\n", r"^x:1: found an anchor"),
        (b"- x\n- *a\n", r"^x:2: .*anchor"),
        (b"conversations:\n- - q\n  - 'a\n", r"^x:\d: .*expected valid YAML"),
        (b"conversations:\n- - q\n a: b: c\n", r"^x:\d: .*expected valid YAML"),
        (b"- x\n- \xff\n", "expected valid YAML in UTF-8"),
        (b"- x\n- \x00\n", "expected valid YAML in UTF-8"),
        (b"a: 1\nb: 2\na: 3\n", r"^x:3: found the key 'a' a second time"),
        (b"[a, b]: 1\n", r"^x:1: found a key that is no text"),
        (b"[" * 101 + b"]" * 101, "nesting deeper than 100 levels"),
        (b"- " * 50_000 + b"x", "nesting deeper than 100 levels"),
        (b"[" * 50_000, "nesting deeper than 100 levels|expected valid YAML"),
    ],
)  # fmt: skip
def test_broken_yaml_is_refused_with_its_line(data, message):
    with pytest.raises(DataError, match=message):
        records_of(frame_yaml(queue_of(data), is_record=is_record))


def test_yaml_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(yaml_files, "MAX_YAML_BYTES", 100)
    with pytest.raises(DataError, match="more than 100 bytes of YAML"):
        records_of(frame_yaml(queue_of(b"- x\n" * 100, 50), is_record=is_record))


def test_a_mapping_that_is_a_record_is_one():
    data = b"conversations:\n- text: q\n- text: a\n"
    (found,) = records_of(frame_yaml(queue_of(data), is_record=lambda value: "conversations" in value))
    assert found == (1, {"conversations": [{"text": "q"}, {"text": "a"}]})
    two = b"---\nconversations:\n- - q\n---\n- - b\n"
    assert records_of(frame_yaml(queue_of(two), is_record=is_record)) == [(1, ["q"]), (2, ["b"])]
