"""Trees against a naive recursion: the same paths, and each answer trained once."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.canonical import Rules, canonicalize, role_table
from ismdata.convert.corpus_format import Choices, Place, SourceBlock, with_choices
from ismdata.convert.formats import trees
from ismdata.convert.formats.dialogue_rows import DIALOGUE_ROWS
from ismdata.convert.formats.registry import detect
from ismdata.convert.formats.trees import NESTED_TREES, TREE_ROWS
from ismdata.convert.read_block import read_records
from ismdata.convert.sources.blocks import ValueBlock
from ismdata.errors import Refused

ROLES = role_table({})
PLACE = Place(prefix="trees.jsonl:", stem="trees")


def message(name: str, parent: str | None, **fields: Any) -> dict[str, Any]:
    depth = 0 if parent is None else fields.pop("depth", 1)
    role = "assistant" if depth % 2 else "prompter"
    return {"message_tree_id": "t", "message_id": name, "parent_id": parent, "role": role, "text": name, **fields}


@st.composite
def random_rows(draw: Any) -> list[dict[str, Any]]:
    """The rows of one tree in any order; some cut, some ranked, some without a text."""
    count = draw(st.integers(1, 12))
    depth, rows = [0], []
    for number in range(count):
        parent = draw(st.integers(0, number - 1)) if number else None
        depth.append(0)
        depth[number] = 0 if parent is None else depth[parent] + 1
        fields: dict[str, Any] = {
            "rank": draw(st.sampled_from([None, 0, 1, 2, "1"])),
            "deleted": draw(st.sampled_from([False, False, False, True])),
            "review_result": draw(st.sampled_from([True, None, True, False])),
            "depth": depth[number],
        }
        if draw(st.integers(0, 9)) == 0:
            fields["text"] = ""
        rows.append(message(f"m{number}", None if parent is None else f"m{parent}", **fields))
    for row in rows:
        row.pop("depth", None)
    return draw(st.permutations(rows))


def naive_paths(rows: list[dict[str, Any]], best: bool = False) -> list[list[dict[str, Any]]]:
    """All paths of one tree, straight from the definition."""

    def kept(row: dict[str, Any]) -> bool:
        return not row["deleted"] and row["review_result"] is not False

    def below(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
        replies = [other for other in rows if other["parent_id"] == row["message_id"] and kept(other)]
        replies.sort(key=lambda reply: 99 if reply["rank"] is None else int(reply["rank"]))
        if best:
            replies = replies[:1]
        return [[row, *path] for reply in replies for path in below(reply)] if replies else [[row]]

    (root,) = [row for row in rows if row["parent_id"] is None]
    return below(root) if kept(root) else []


def drafts_of(rows: list[dict[str, Any]], tree: Any = "all") -> list[Any]:
    corpus_format = with_choices(TREE_ROWS, Choices(roles=ROLES, tree=tree))
    try:
        return list(corpus_format.parse_record(rows))
    except Refused as refusal:
        assert refusal.reason == "rejected"
        return []


def usable(draft: Any) -> bool:
    try:
        canonicalize(draft, Rules(roles=ROLES))
    except Refused:
        return False
    return True


@given(random_rows())
def test_paths_are_those_of_the_definition(rows: list[dict[str, Any]]) -> None:
    for tree in ("all", "best"):
        drafts = drafts_of(rows, tree)
        found = [[(one["role"], one["content"]) for one in draft.messages] for draft in drafts]
        paths = naive_paths(rows, best=tree == "best")
        assert found == [[(row["role"], row["text"]) for row in path] for path in paths]
        assert [draft.id for draft in drafts] == [path[-1]["message_id"] for path in paths]
        assert {draft.split_group for draft in drafts} <= {"t"}


@given(random_rows())
def test_each_answer_is_trained_once(rows: list[dict[str, Any]]) -> None:
    paths = naive_paths(rows)
    trained: Counter[str] = Counter()
    written = set()
    for draft, path in zip(drafts_of(rows), paths, strict=True):
        if not usable(draft):
            continue
        for one, row in zip(draft.messages, path, strict=True):
            if row["role"] == "assistant":
                written.add(row["message_id"])
                trained[row["message_id"]] += one.get("train") is not False
            else:
                assert "train" not in one
    assert trained == Counter(dict.fromkeys(written, 1))


def nested(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def below(row: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in row.items() if name not in ("parent_id", "message_tree_id")}
        replies = [below(other) for other in rows if other["parent_id"] == row["message_id"]]
        return {**own, **({"replies": replies} if replies else {})}

    (root,) = [row for row in rows if row["parent_id"] is None]
    return {"message_tree_id": "t", "prompt": below(root)}


@given(random_rows())
def test_nested_trees_are_the_same(rows: list[dict[str, Any]]) -> None:
    record = nested(rows)
    assert detect(record) == "oasst_trees"
    assert detect(rows[0]) == "oasst"
    for tree in ("all", "best"):
        corpus_format = with_choices(NESTED_TREES, Choices(roles=ROLES, tree=tree))
        try:
            found = list(corpus_format.parse_record(record))
        except Refused as refusal:
            assert refusal.reason == "rejected"
            found = []
        expected = drafts_of(rows, tree)
        assert [(one.id, one.messages, one.split_group, one.extra) for one in found] == [
            (one.id, one.messages, one.split_group, one.extra) for one in expected
        ]
        assert sum(len(one.ignored) for one in found) == sum(len(one.ignored) for one in expected)


def outcome(part: Any, row: int) -> Any:
    """The ids of the messages of a record; with the reason of its refusal where it is refused."""
    raw = part.raw(row)
    names = [one["message_id"] for one in (raw if isinstance(raw, list) else [raw])]
    try:
        assert part.record(row) == raw
    except Refused as refusal:
        return (refusal.reason, names)
    return names


def grouped(rows: list[Any]) -> list[Any]:
    block = ValueBlock(values=rows, numbers=np.arange(1, len(rows) + 1))
    return [outcome(part, row) for part, _ in TREE_ROWS.regroup([(block, PLACE)]) for row in range(len(part.numbers))]


def test_loose_parts_are_refused_and_the_rest_is_read() -> None:
    rows = [
        message("a", None), message("b", "a"), message("c", "gone"), message("d", "c"),
        message("e", "g"), message("f", "e"), message("g", "f"), message("h", "g"),
        message("b", "a"), message("i", "i"),
    ]  # fmt: skip
    assert grouped(rows) == [
        ["a", "b"],
        ("broken_tree", ["c", "d"]),
        ("broken_tree", ["e", "f", "g", "h"]),
        ("broken_tree", ["b"]),
        ("broken_tree", ["i"]),
    ]


def test_a_loose_part_is_shown_whole() -> None:
    rows = [message("a", None), message("c", "gone"), message("d", "c"), message("x", "y"), message("y", "x")]
    block = ValueBlock(values=rows, numbers=np.arange(1, 6))
    ((part, _),) = TREE_ROWS.regroup([(block, PLACE)])
    assert [part.raw(row) for row in range(3)] == [[rows[0]], rows[1:3], rows[3:]]
    assert part.numbers.tolist() == [1, 2, 4]


@given(st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(0, 9)), max_size=14))
def test_no_row_is_lost(links: list[tuple[int, int | None]]) -> None:
    """Whatever hangs on whatever, each row is in one record, and the rows of sound ones reach a root."""
    rows = [message(str(own), None if parent is None else str(parent)) for own, parent in links]
    block = ValueBlock(values=rows, numbers=np.arange(1, len(rows) + 1))
    seen: list[int] = []
    for part, _ in TREE_ROWS.regroup([(block, PLACE)]):
        for row in range(len(part.numbers)):
            seen += [id(one) for one in part.raw(row)] if isinstance(part.raw(row), list) else [id(part.raw(row))]
            try:
                record = part.record(row)
            except Refused as refusal:
                assert refusal.reason == "broken_tree"
                continue
            assert TREE_ROWS.parse_record(record)
    assert sorted(seen) == sorted(map(id, rows))


@pytest.mark.parametrize(
    "odd",
    [{"message_tree_id": None}, {"message_tree_id": ["t"]}, {"message_id": ""}, {"parent_id": ["a"]}],
    ids=["no tree", "list as tree", "no id", "list as parent"],
)
def test_rows_without_their_place_stand_alone(odd: dict[str, Any]) -> None:
    first, *others = grouped([message("a", None), {**message("b", "a"), **odd}])
    assert first == ["a"]
    assert [reason for reason, _ in others] in (["missing_field"], ["invalid_field"])


@pytest.mark.slow
def test_deep_trees() -> None:
    """No recursion: 30,000 levels, as rows and nested."""
    depth = 30_000
    rows = [message(str(level), str(level - 1) if level else None, depth=level) for level in range(depth)]
    random.Random(0).shuffle(rows)
    ((part, _),) = TREE_ROWS.regroup([(ValueBlock(values=rows, numbers=np.arange(1, depth + 1)), PLACE)])
    (draft,) = TREE_ROWS.parse_record(part.record(0))
    assert [one["content"] for one in draft.messages] == [str(level) for level in range(depth)]
    inner: dict[str, Any] = {"text": "0", "role": "prompter"}
    for level in range(1, depth):
        inner = {"text": str(level), "role": "prompter", "replies": [inner]}
    (draft,) = NESTED_TREES.parse_record({"message_tree_id": "t", "prompt": inner})
    assert len(draft.messages) == depth
    while inner.get("replies"):  # taken apart here, level by level
        inner = inner.pop("replies")[0]


def test_too_many_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [message("a", None), *(message(str(number), "a") for number in range(10))]
    monkeypatch.setattr(trees, "MOST_TEXT", 10 * 202)
    assert len(TREE_ROWS.parse_record(rows)) == 10
    monkeypatch.setattr(trees, "MOST_TEXT", 10 * 202 - 1)
    with pytest.raises(Refused, match="--tree best") as caught:
        TREE_ROWS.parse_record(rows)
    assert caught.value.reason == "too_many_paths"
    assert len(with_choices(TREE_ROWS, Choices(roles=ROLES, tree="best")).parse_record(rows)) == 1


def test_a_bad_message_spoils_its_own_paths_alone() -> None:
    record = {
        "message_tree_id": "t",
        "prompt": {"text": "q", "role": "prompter", "replies": ["nonsense", {"text": "a", "role": "assistant"}]},
    }
    bad, good = NESTED_TREES.parse_record(record)
    assert (usable(bad), usable(good)) == (False, True)
    assert (bad.id_suffix, good.id_suffix) == ("path1", "path2")
    with pytest.raises(Refused, match="expected a list"):
        NESTED_TREES.parse_record({"prompt": {"text": "q", "role": "prompter", "replies": {"a": 1}}})


def test_role_names_of_the_user_decide_what_an_answer_is() -> None:
    rows = [
        {**message("a", None), "role": "asker"}, {**message("b", "a"), "role": "sage"},
        {**message("c", "b"), "role": "asker"}, {**message("d", "b"), "role": "asker"},
    ]  # fmt: skip
    corpus_format = with_choices(TREE_ROWS, Choices(roles=role_table({"asker": "user", "sage": "assistant"})))
    first, second = corpus_format.parse_record(rows)
    assert [one.get("train") for one in first.messages] == [None, None, None]
    assert [one.get("train") for one in second.messages] == [None, False, None]


_NAMES = ("message_tree_id", "message_id", "parent_id", "role", "text", "rank", "deleted", "replies", "prompt")
_ROW_NAMES = ("dialogue_id", "turn", "speaker", "text")
values = st.recursive(
    st.sampled_from([None, True, 0, 1, 1.5, 10**400, "", "a", "b", "prompter", "assistant", "9" * 5000, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=8)
        | st.dictionaries(st.sampled_from(_ROW_NAMES), inner, max_size=4)
    ),
    max_leaves=20,
)


rows = st.fixed_dictionaries(dict.fromkeys(_NAMES[:5], values)) | st.fixed_dictionaries(
    dict.fromkeys(_ROW_NAMES, values)
)


@pytest.mark.slow
@given(st.lists(values | rows, max_size=4))
def test_hostile_values_are_read_or_refused(given_values: list[Any]) -> None:
    block = ValueBlock(values=given_values, numbers=np.arange(1, len(given_values) + 1))
    for corpus_format in (TREE_ROWS, NESTED_TREES, DIALOGUE_ROWS):
        assert all(isinstance(corpus_format.matches(value), bool) for value in given_values)
        records = 0
        for part, place in corpus_format.regroup([(block, PLACE)]):
            reading = read_records(SourceBlock(part, place, corpus_format), Rules(roles=ROLES))
            records += len(part.numbers)
            assert len(reading.rows) + len(reading.quarantined) >= len(part.numbers)
        assert records <= len(given_values)
        assert (records > 0) == (len(given_values) > 0)
