"""Tables of text: separators, single columns, long cells, and rows that do not fit."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.sources.delimited import detect_delimiter
from ismdata.errors import DataError
from tests.support.converted import convert_files
from tests.support.shapes import QA, Q, R, chat

CHATML = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{R}<|im_end|>\n"


def column(name: str, *cells: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([[name], *([cell] for cell in cells)])
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("text", f"USER: {Q} ASSISTANT: {R}"),
        ("text", CHATML),
        ("dialogue", f"Ann: {Q}\nBo: {R}"),
        ("messages", json.dumps(chat(*QA))),
    ],
)
def test_a_table_may_have_one_column(tmp_path, name, cell):
    found = convert_files(tmp_path, {"a.csv": column(name, cell, cell)})
    assert (found.talks, found.refusals) == ([QA, QA], [])


def test_commas_in_a_single_column_do_not_part_it(tmp_path):
    data = f"text\nUSER: One, two? ASSISTANT: {R}\nUSER: {Q} ASSISTANT: {R}\n"
    assert convert_files(tmp_path, {"a.csv": data}).talks == [[("user", "One, two?"), QA[1]], QA]


@pytest.mark.parametrize("size", [131_073, 5 << 20])
@pytest.mark.parametrize("place", [0, 1, 19])
def test_long_cells_are_read_wherever_they_are(tmp_path, size, place):
    rows = [[Q, R] for _ in range(20)]
    rows[place] = [Q, "y" * size]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["prompt", "completion"], *rows])
    found = convert_files(tmp_path, {"a.csv": out.getvalue()})
    assert [len(talk[1][1]) for talk in found.talks] == [len(answer) for _, answer in rows]


@pytest.mark.parametrize("size", [131_073, 5 << 20])
def test_a_long_cell_may_be_in_the_only_row(tmp_path, size):
    found = convert_files(tmp_path, {"a.csv": f"prompt,completion\n{'x' * size},{R}\n"})
    assert [[len(text) for _, text in talk] for talk in found.talks] == [[size, len(R)]]


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_a_first_row_with_a_cell_too_many_is_refused_alone(tmp_path, name):
    found = convert_files(tmp_path, {name: f"prompt,completion\nQ1,A1,zz\n{Q},{R}\n"})
    assert found.talks == [QA]
    assert found.refusals == [("invalid_row", "the row has 3 cells; expected 2 as in the header: prompt, completion")]


def test_rows_that_all_have_a_cell_too_many_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:2: the row has 3 cells; expected 2 as in the header"):
        convert_files(tmp_path, {"a.csv": "prompt,completion\nQ1,A1,zz\nQ2,A2,zz\n"})


@pytest.mark.parametrize("data", ['prompt,completion\n"Q1,A1\nQ2,A2\n', 'prompt,completion\n"Q1" ,A1\nQ2,A2\n'])
def test_a_broken_quote_in_the_first_row_is_named(tmp_path, data):
    with pytest.raises(DataError, match=r"a\.csv:2: found a broken row"):
        convert_files(tmp_path, {"a.csv": data})


def test_a_table_may_end_its_lines_with_returns(tmp_path):
    found = convert_files(tmp_path, {"a.csv": f"prompt,completion\r{Q},{R}\r{Q},{R}\r"})
    assert found.talks == [QA, QA]


@given(st.lists(st.lists(st.text(alphabet='ab,;|\t"\n', max_size=4), max_size=4), max_size=6), st.booleans())
def test_a_separator_is_found_or_none(rows, named):
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    assert detect_delimiter(out.getvalue().encode(), lambda record: False, named=named) in (None, ",", "\t", ";", "|")
