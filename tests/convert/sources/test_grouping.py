"""Rows to records against a dumb loop over all rows at once, however the blocks are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.canonical import role_table
from ismdata.convert.corpus_format import Choices, Place, with_choices
from ismdata.convert.formats.dialogue_rows import DIALOGUE_ROWS
from ismdata.convert.formats.registry import detect
from ismdata.convert.sources.blocks import TableBlock
from ismdata.convert.sources.framing import line_block
from ismdata.convert.sources.grouping import group_by_key, group_by_start, select_columns, sort_rows
from ismdata.errors import Refused

PLACES = [Place(prefix="a.jsonl:", stem="a"), Place(prefix="b.jsonl:", stem="b")]

#: Rows are digits, blocks are strings of them; "!" is a line that cannot be read, "?" one that says not where it goes.
files = st.lists(st.lists(st.text("0123!?", max_size=6), max_size=4), max_size=2)


def blocks_of(files: list[list[str]]) -> list[Any]:
    """Each file as blocks of lines, numbered on."""
    blocks = []
    for place, cut in zip(PLACES, files, strict=False):
        line = 1
        for rows in cut:
            data = "".join(f"{'{' if row == '!' else row if row != '?' else 'null'}\n" for row in rows).encode()
            blocks.append((line_block(data, line)[0], place))
            line += len(rows)
    return blocks


def read(groups: Any) -> list[tuple[str, int, Any]]:
    """Prefix, number, and rows of each record or the reason why it has none."""
    found = []
    for block, place in groups:
        for row in range(len(block.numbers)):
            try:
                value = block.record(row)
            except Refused as refusal:
                value = refusal.reason
            found.append((place.prefix, int(block.numbers[row]), value))
    return found


def lone(row: str) -> str | None:
    return {"!": "invalid_json", "?": "missing_field"}.get(row)


def starts(row: Any) -> bool:
    if row is None:
        raise Refused("missing_field", "says nothing")
    return bool(row == 0)


def key(row: Any) -> int:
    if row is None:
        raise Refused("missing_field", "says nothing")
    return int(row)


@given(files)
def test_by_start(files: list[list[str]]) -> None:
    expected: list[tuple[str, int, Any]] = []
    for place, cut in zip(PLACES, files, strict=False):
        current: list[int] | None = None
        for number, row in enumerate("".join(cut), 1):
            if lone(row):
                expected.append((place.prefix, number, lone(row)))
            elif row == "0" or current is None:
                current = [int(row)]
                expected.append((place.prefix, number, current))
            else:
                current.append(int(row))
    assert read(group_by_start(blocks_of(files), starts)) == expected


@given(files)
def test_by_key(files: list[list[str]]) -> None:
    expected: list[tuple[str, int, Any]] = []
    for place, cut in zip(PLACES, files, strict=False):
        rows = "".join(cut)
        for number, row in enumerate(rows, 1):
            if lone(row):
                expected.append((place.prefix, number, lone(row)))
            elif row not in rows[: number - 1]:
                expected.append((place.prefix, number, [int(row)] * rows.count(row)))
    assert read(group_by_key(blocks_of(files), key)) == expected


def test_what_is_refused_is_shown_as_it_stands() -> None:
    (block, _), *_ = group_by_key(blocks_of([["1!1"]]), key)
    assert [block.raw(0), block.raw(1)] == [[1, 1], "{"]


def test_many_rows_come_in_several_blocks() -> None:
    blocks = list(group_by_key(blocks_of([["01" * 10]]), lambda row: row))
    assert len(blocks) == 1
    data = b"".join(b"%d\n" % (number // 2) for number in range(20_000))
    many = list(group_by_key([(line_block(data, 1)[0], PLACES[0])], lambda row: row))
    assert len(many) == 5
    assert [rows for _, _, rows in read(many)] == [[number, number] for number in range(10_000)]


def test_columns_of_a_table_are_looked_at_alone() -> None:
    table = pa.table({"id": [1, 1], "text": ["a", "b"]})
    block = TableBlock(rows=table, numbers=np.array([1, 2]))
    assert select_columns(block, ["id", "other"]).record(0) == {"id": 1}
    groups = group_by_key([(block, PLACES[0])], lambda row: row["id"], columns=["id"])
    assert read(groups) == [("a.jsonl:", 1, [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}])]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["10", "9", " 1 "], [" 1 ", "9", "10"]),
        ([2, 1.5, "1"], ["1", 1.5, 2]),
        (["2", "b", "1"], ["2", "b", "1"]),
        ([2, None, 1], [2, None, 1]),
        ([True, 0], [True, 0]),
        (["9" * 5000, "1"], ["9" * 5000, "1"]),
    ],
)
def test_order(values: list[Any], expected: list[Any]) -> None:
    assert [row["n"] for row in sort_rows([{"n": value} for value in values], "n")] == expected
    assert sort_rows([{"n": value} for value in values], None) == [{"n": value} for value in values]


# ---- tables of utterances ----


def rows_of(*said: tuple[str, str, str], turns: list[int] | None = None) -> list[dict[str, Any]]:
    rows = [{"Dialogue_ID": dialogue, "Speaker": who, "Utterance": text} for dialogue, who, text in said]
    return [{**row, "Utterance_ID": str(turn)} for row, turn in zip(rows, turns or range(len(rows)), strict=True)]


def messages(rows: list[dict[str, Any]], **choices: Any) -> list[list[tuple[str, str]]]:
    corpus_format = with_choices(DIALOGUE_ROWS, Choices(roles=role_table(choices.pop("roles", {})), **choices))
    return [[(one["role"], one["content"]) for one in draft.messages] for draft in corpus_format.parse_record(rows)]


def test_two_speakers_are_cast_and_rows_come_in_order() -> None:
    rows = rows_of(("7", "Ann", "b"), ("7", "Bo", "a"), turns=[10, 9])
    assert detect(rows[0]) == "dialogue_rows"
    assert messages(rows) == [[("user", "a"), ("assistant", "b")]]
    assert messages(rows, assistant="both") == [
        [("user", "a"), ("assistant", "b")],
        [("assistant", "a"), ("user", "b")],
    ]


def test_many_speakers_are_refused_until_roles_are_known() -> None:
    rows = rows_of(("7", "Ann", "a"), ("7", "Bo", "b"), ("7", "Cy", "c"))
    with pytest.raises(Refused, match="3 speakers"):
        messages(rows)
    known = {"Bo": "assistant", "Ann": "user", "Cy": "user"}
    assert messages(rows, roles=known) == [[("Ann", "a"), ("Bo", "b"), ("Cy", "c")]]


def test_what_all_rows_share_is_kept_and_the_rest_counted() -> None:
    rows = rows_of(("7", "Ann", "a"), ("7", "Bo", "b"))
    rows[0] |= {"season": "4", "mood": "calm", "note": ""}
    rows[1] |= {"season": "4", "mood": "glad", "note": "x"}
    (draft,) = DIALOGUE_ROWS.parse_record(rows)
    assert (draft.id, draft.extra, sorted(draft.ignored)) == ("7", {"season": "4"}, ["mood", "mood", "note"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"dialog_id": 1, "speaker": None, "text": "a"}, "missing_role"),
        ({"dialog_id": 1, "speaker": ["Ann"], "text": "a"}, "invalid_field"),
        ({"dialog_id": 1, "text": "a"}, "missing_field"),
        ("a line", "not_an_object"),
    ],
)
def test_rows_that_do_not_do(row: Any, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        DIALOGUE_ROWS.parse_record([row])
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["", None, True, ["7"]])
def test_rows_of_no_dialogue_stand_alone(name: Any) -> None:
    table = [{"dialog_id": 1, "speaker": "Ann", "text": "a"}, {"dialog_id": name, "speaker": "Ann", "text": "b"}]

    class Rows:
        numbers = np.array([1, 2])

        def record(self, row: int) -> Any:
            return table[row]

    found = read(DIALOGUE_ROWS.regroup([(Rows(), PLACES[0])]))  # type: ignore[list-item]
    assert found == [("a.jsonl:", 1, [table[0]]), ("a.jsonl:", 2, "missing_field")]
