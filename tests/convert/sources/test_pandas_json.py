"""JSON as pandas writes it: the rows of a data frame are the records."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.sources.pandas_json import _rows
from ismdata.errors import DataError
from tests.support.converted import convert_files
from tests.support.shapes import QA, Q, R, chat

ROWS = [{"prompt": Q, "completion": R}, {"prompt": "And then?", "completion": "No."}]
TALKS = [QA, [("user", "And then?"), ("assistant", "No.")]]


def by_column(rows, label=str):
    return {name: {label(at): row[name] for at, row in enumerate(rows)} for name in rows[0]}


def split(rows):
    return {"columns": [*rows[0]], "index": [*range(len(rows))], "data": [[*row.values()] for row in rows]}


def table(rows):
    fields = [{"name": name, "type": "string"} for name in rows[0]]
    return {"schema": {"fields": fields, "primaryKey": ["index"], "pandas_version": "1.4.0"}, "data": rows}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("orient", [by_column, split, table], ids=["columns", "split", "table"])
def test_the_rows_of_a_data_frame_are_the_records(tmp_path, orient, indent):
    found = convert_files(tmp_path, {"a.json": json.dumps(orient(ROWS), indent=indent)})
    assert (found.talks, found.refusals) == (TALKS, [])
    assert found.report.sources[0].layout == "pandas JSON"


def test_rows_may_be_numbered_from_anywhere_and_hold_lists(tmp_path):
    rows = [{"id": "7", "messages": chat(*QA)}, {"id": "8", "messages": chat(*QA)}]
    found = convert_files(tmp_path, {"a.json": json.dumps(by_column(rows, lambda at: str(at + 40)))})
    assert found.talks == [QA, QA]


def test_the_orients_by_row_are_objects_of_records_and_arrays(tmp_path):
    by_row = {str(at): row for at, row in enumerate(ROWS)}
    files = {"index.json": json.dumps(by_row), "records.json": json.dumps(ROWS), "values.json": json.dumps([[Q, R]])}
    assert convert_files(tmp_path, files).talks == [*TALKS, *TALKS, QA]


def test_unknown_columns_are_named(tmp_path):
    with pytest.raises(DataError, match="the first record has the fields 'ask', 'tell'; expected a known format"):
        convert_files(tmp_path, {"a.json": json.dumps(by_column([{"ask": Q, "tell": R}]))})


def test_objects_of_numbered_turns_are_no_columns():
    turns = {"0": {"by": "a", "said": Q}, "1": {"by": "b", "said": R}}
    assert _rows({"talk1": turns, "talk2": turns}, lambda record: True) is None


@given(
    st.recursive(
        st.none() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["columns", "index", "data", "schema", "fields", "0", "1"]), inner, max_size=3
            )
        ),
        max_leaves=12,
    )
)
def test_any_value_is_rows_or_none(value):
    found = _rows(value, lambda record: False)
    assert found is None or all(isinstance(row, dict) for row in found)
