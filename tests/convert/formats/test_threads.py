"""Rows of messages that name their parents or their thread: no two threads, and no two branches, become one talk."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.formats.threads import is_chain
from tests.support.one_corpus import convert_text, lines
from tests.support.records import read, refusal
from tests.support.shapes import QA, A, U

KEYS = ["thread", "thread_id", "session", "session_id", "dialog_id", "conv_id", "conversationId", "chat_id", "root"]
PARENTS = [
    "parent_message_id",
    "parent_id",
    "parent_uuid",
    "parentUuid",
    "reply_to",
    "in-reply-to",
    "parent",
    "parentId",
]


def row(own, parent, role, text, **more):
    return {"id": own, "parent_id": parent, "role": role, "text": text, **more}


TREE = [row(1, None, U, "q"), row(2, 1, A, "a"), row(3, 1, A, "b"), row(4, 2, U, "more"), row(5, None, U, "x"),
        row(6, 5, A, "y")]  # fmt: skip
PATHS = [[(U, "q"), (A, "a"), (U, "more")], [(U, "q"), (A, "b")], [(U, "x"), (A, "y")]]


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("layout", [json.dumps, lambda rows: lines(*rows)])
def test_a_list_of_messages_with_the_key_of_a_thread(tmp_path, name, layout):
    rows = [{name: key, "role": role, "content": text} for key in (1, 2) for role, text in ((U, f"q{key}"), (A, "a"))]
    found = convert_text(tmp_path, layout(rows), "corpus.json")
    assert found.turns == [[(U, "q1"), (A, "a")], [(U, "q2"), (A, "a")]]


@pytest.mark.parametrize("name", PARENTS)
def test_parents_without_a_key(tmp_path, name):
    rows = [{name if key == "parent_id" else key: value for key, value in one.items()} for one in TREE]
    assert convert_text(tmp_path, json.dumps(rows), "corpus.json").turns == PATHS
    assert convert_text(tmp_path, lines(*rows), tree="best").turns == [PATHS[0], PATHS[2]]
    assert convert_text(tmp_path, pa.Table.from_pylist(rows)).turns == PATHS


def test_numbers_of_several_types_are_the_same_id(tmp_path):
    csv = "id,parent_id,role,text\n1,,user,q\n2,1.0,assistant,a\n"
    assert convert_text(tmp_path, csv, "corpus.csv").turns == [[(U, "q"), (A, "a")]]


def test_a_key_and_parents(tmp_path):
    branches = [{**one, "thread": 7} for one in TREE]
    found = convert_text(tmp_path, lines(*branches))
    assert (found.turns, found.report.sources[0].format) == (PATHS, "dialogue_rows")
    # Parents that are none of its messages do not take a thread apart.
    elsewhere = [row(at, f"elsewhere {at}", role, text, thread=at // 2) for at, (role, text) in enumerate([*QA, *QA])]
    assert convert_text(tmp_path, json.dumps(elsewhere), "corpus.json").turns == [QA, QA]


def test_two_people(tmp_path):
    rows = [row(1, None, "Ann", "q"), row(2, 1, "Bo", "a"), row(3, 1, "Bo", "b")]
    assert convert_text(tmp_path, lines(*rows)).turns == [[(U, "q"), (A, "a")], [(U, "q"), (A, "b")]]
    found = convert_text(tmp_path, lines(*rows[:2]), assistant="both")
    assert found.turns == [[(U, "q"), (A, "a")], [(A, "q"), (U, "a")]]
    assert len({one["id"] for one in found.rows}) == 2
    many = [*rows, row(4, 3, "Cy", "c")]
    assert convert_text(
        tmp_path, lines(*TREE, *[{**one, "id": one["id"] + 10, "parent_id": None} for one in many])
    ).rows
    assert refusal("threads", many)[0] == "many_speakers"


def test_what_is_no_tree_is_refused(tmp_path):
    orphan, circle, again = row(8, 99, A, "o"), [row(10, 11, U, "c"), row(11, 10, A, "d")], row(6, 5, A, "z")
    found = convert_text(tmp_path, lines(*TREE, orphan, *circle, again, {**TREE[0], "id": None}))
    assert found.turns == PATHS
    assert sorted(found.reasons) == ["broken_tree", "broken_tree", "broken_tree", "missing_field"]
    for bad in ([*TREE[:2], orphan], [*TREE[:2], *circle], [*TREE[:3], TREE[2]]):
        assert refusal("dialogue_rows", [{**one, "thread": 1} for one in bad])[0] == "broken_tree"


def test_the_first_row_may_have_no_parent_field(tmp_path):
    root = {"id": 1, "role": U, "text": "q"}
    assert convert_text(tmp_path, lines(root, TREE[1], TREE[2])).turns == [[(U, "q"), (A, "a")], [(U, "q"), (A, "b")]]


@pytest.mark.parametrize("name", ["messages", "utterances", "conversations"])
def test_a_list_with_branches_is_refused(tmp_path, name):
    messages = [
        {"id": one["id"], "parentId": one["parent_id"], "role": one["role"], "content": one["text"]} for one in TREE
    ]
    record, chain = {name: messages}, {name: messages[:2]}
    for table in (None, pa.Table.from_pylist([{**chain, "n": 1}, {**record, "n": 2}])):
        found = convert_text(tmp_path, lines(chain, record) if table is None else table)
        assert (found.turns, found.reasons) == ([[(U, "q"), (A, "a")]], ["broken_tree"])


def test_a_list_with_several_threads_is_refused():
    messages = [{"role": role, "content": text, "thread_id": at} for at in (1, 2) for role, text in QA]
    assert refusal("messages", {"messages": messages})[0] == "broken_tree"
    assert read("messages", {"messages": messages[:2]}) == [QA]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_chains(parents):
    rows = [{"id": at, "parent_id": parent} for at, parent in enumerate(parents)]
    inside = [parent < len(parents) for parent in parents]
    linear = not inside[0] and all(parent == at - 1 for at, parent in enumerate(parents[1:], 1))
    assert is_chain(rows) == (linear or not any(inside))
