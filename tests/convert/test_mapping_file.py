"""The mapping file: what it describes, what it refuses, how it compares with the formats, and what is guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.conversation import ROLES
from ismdata.convert.canonical import Rules, canonicalize, role_table
from ismdata.convert.corpus_format import Choices, CorpusFormat, with_choices
from ismdata.convert.formats.mapped import Mapped, remove_at, value_at
from ismdata.convert.guess_mapping import regroup_records
from ismdata.convert.mapping_file import KEYS, load_mapping, mapping_text, parse_mapping
from ismdata.errors import Refused, UsageError
from tests.support.converted import convert_files
from tests.support.paths import ROOT

CHOICES = Choices(roles=role_table({}))
DOCS = ROOT / "docs" / "mapping.md"


def with_roles(mapped: Mapped, **roles: str) -> Mapped:
    """The mapping with the file's roles and those of the command line, as `convert` combines them."""
    return with_choices(mapped, Choices(roles=role_table({**mapped.roles, **roles}), assistant=mapped.assistant))


def conversations(corpus_format: CorpusFormat, records: Sequence[Any], roles: Any = CHOICES.roles) -> list[Any]:
    """The messages of each conversation as role and content; the reason if a record is refused."""
    found: list[Any] = []
    for record in regroup_records(corpus_format, records) if isinstance(corpus_format, Mapped) else records:
        try:
            drafts = corpus_format.parse_record(record)
            rows = [canonicalize(draft, Rules(roles=roles)) for draft in drafts]
        except Refused as refusal:
            found.append(refusal.reason)
            continue
        found += [[(one["role"], one["content"]) for one in row["messages"]] for row in rows]
    return found


def read(text: str, *records: Any, **roles: str) -> list[Any]:
    mapped = with_roles(parse_mapping(text, "my.toml"), **roles)
    return conversations(mapped, records, mapped.roles)


# ---- valid files ----

QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("text", "record", "expected"),
    [
        ('messages = "."', ["q", "a"], QA),
        ('messages = "d.t"', {"d": {"t": ["q", "a"]}}, QA),
        ('messages = "d.t"', {"d.t": ["q", "a"]}, QA),
        ('messages = "t.1"', {"t": [[], ["q", "a"]]}, QA),
        ('messages = "t"\ncontent = "x"', {"t": {"n10": {"x": "a"}, "n9": {"x": "q"}}}, QA),
        ('messages = "t"\ncontent = "x"', {"t": {"x": ["q", "a"]}}, QA),
        ('messages = "t"\ncontent = "x"', {"t": {"x": ["q", "a"], "y": [1]}}, "invalid_field"),
        ('messages = "t"\ncontent = "x"\nassistant = "first"', {"t": [{"x": "a"}, {"x": "q"}]}, [QA[1], QA[0]]),
        ('messages = "t"\nrole = "m.by"\ncontent = "m.x"', {"t": [{"m": {"by": "GPT", "x": "a"}}]}, [QA[1]]),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": [{"by": 0, "x": "q"}, {"by": 1, "x": "a"}]}, QA),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": [{"by": None, "x": "q"}]}, "missing_role"),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": [{"by": [], "x": "q"}]}, "invalid_field"),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": [{"by": n, "x": "q"} for n in "abc"]}, "many_speakers"),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": [{"by": "gpt"}]}, "missing_content"),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"u": []}, "missing_field"),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": "q"}, "invalid_field"),
        ('messages = "t"\nrole = "by"\ncontent = "x"', {"t": None}, "no_messages"),
        ('messages = "t"', {"t": [1]}, "invalid_content"),
        ('messages = "."\nexchange = ["ask", "say"]', {"ask": "q", "say": "a", "more": 1}, QA),
        ('messages = "t"\nexchange = ["0", "1"]', {"t": [["q", "a"], ["q"]]}, [*QA, QA[0]]),
        ('messages = "t"\nexchange = ["ask", "say"]', {"t": [{"ask": "q", "say": None}]}, [QA[0]]),
        ('messages = "t"\nexchange = ["ask", "say"]', {"t": [{}]}, "missing_field"),
        ('messages = "t"\nexchange = ["assistant", "user"]', {"t": [{"assistant": "a", "user": "q"}]}, [QA[1], QA[0]]),
        ('text = "."\nseparator = "|"\nstrip = true', " q | a |", QA),
        ('text = "t"\nseparator = "|"', {"t": "|q|a"}, QA),
        ('text = "t"\nseparator = "|"', {"t": 1}, "invalid_content"),
        ('text = "t"\nseparator = "|"\nspeaker_separator = ":"', {"t": "A:q|B:a"}, QA),
        ('text = "t"\nseparator = "|"\nspeaker_separator = ":"', {"t": "A:q|a"}, "missing_role"),
        ('text = "t"\nseparator = "|"\nspeaker_separator = ":"\n[roles]\nA = "assistant"\n"*" = "user"',
         {"t": "B:q|A:a|C:q"}, [*QA, QA[0]]),
        ('messages = "t.*"\nrole = "by"\ncontent = "x"',
         {"t": [[{"by": 0, "x": "q"}], [], [{"by": 1, "x": "a"}]]}, QA),
        ('messages = "t.*"', {"t": {"n2": ["a"], "n1": ["q"]}}, [("user", "a"), ("assistant", "q")]),
        ('messages = "*.t"', [{"t": ["q"]}, {"t": ["a"]}], QA),
        ('messages = "t.*.u"', {"t": []}, "no_messages"),
        ('messages = "t.*"', {"t": [1]}, "invalid_field"),
        ('messages = "t"\nanswer = "u.v"', {"t": ["q"], "u": {"v": "a"}}, QA),
        ('messages = "t"\nanswer = "u"', {"t": ["q"]}, [QA[0]]),
        ('messages = "t"\nanswer = "u"', {"t": ["q"], "u": {"x": "a"}}, "invalid_field"),
        ('messages = "t"\nrole = "role"\ncontent = "x"\nanswer = "u.0.m"',
         {"t": [{"role": "user", "x": "q"}], "u": [{"m": {"role": "assistant", "x": "a"}}]}, QA),
        ('messages = "t"\nrole = "role"\ncontent = "x"\nanswer = "u"',
         {"t": [{"role": "user", "x": "q"}], "u": [{"role": "assistant", "x": "a"}]}, QA),
        ('records = "r.*"\nmessages = "t"', {"r": {"k": {"t": ["q", "a"]}}, "t": ["x"]}, QA),
        ('records = "r"\nmessages = "t"', {"r": {"t": ["q", "a"]}}, QA),
        ('records = "r.*"\nmessages = "t"', {"r": 1}, "missing_field"),
        ('messages = "t"\nsystem = "s.p"', {"t": ["q"], "s": {"p": "Hi"}}, [("system", "Hi"), QA[0]]),
        ('messages = "t"\nsystem = "s"', {"t": ["q"], "s": 1}, "invalid_field"),
        ('messages = "t"\nrole = "by"\ncontent = "x"',
         {"t": [{"by": "A", "x": "q"}, {"by": "function_call", "x": '{"name": "f"}'}, {"by": "B", "x": "a"}]},
         [QA[0], ("assistant", None), QA[1]]),
    ],
)  # fmt: skip
def test_records_are_read_as_described(text: str, record: Any, expected: Any) -> None:
    assert read(text, record) == [expected]


def test_rows_are_grouped_and_ordered() -> None:
    rows = [{"d": "1", "n": "10", "x": "a"}, {"d": "2", "n": "1", "x": "q"}, {"d": "1", "n": "9", "x": "q"}]
    assert read('group = "d"\norder = "n"\ncontent = "x"', *rows) == [QA, [QA[0]]]


def test_conversations_inside_records_are_named_after_both_and_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('records = "r.*"\nmessages = "t"')
    data = json.dumps({"r": [{"t": ["q", "a"]}, {"t": [1]}, {"t": ["q", "a"], "id": "x"}], "more": 1})
    found = convert_files(tmp_path, {"a.jsonl": f"{data}\n{data}\n"}, mapping=tmp_path / "my.toml")
    assert found.talks == [QA] * 4
    assert [reason for reason, _ in found.refusals] == ["invalid_content"] * 2
    with pa.ipc.open_stream(tmp_path / "converted" / "conversations-00000.arrow") as stream:
        rows = stream.read_all().to_pylist()
    assert [(row["id"], row["source"].removeprefix(f"{tmp_path}/")) for row in rows[:3]] == [
        ("a-1-1", "a.jsonl:1:record 1"), ("x", "a.jsonl:1:record 3"), ("a-2-1", "a.jsonl:2:record 1"),
    ]  # fmt: skip


def test_both_sides() -> None:
    drafts = parse_mapping('messages = "."\nassistant = "both"', "my.toml").parse_record(["q", "a"])
    assert [(draft.id_suffix, [one["role"] for one in draft.messages]) for draft in drafts] == [
        ("second", ["user", "assistant"]),
        ("first", ["assistant", "user"]),
    ]


def test_the_command_line_overrides_the_file() -> None:
    text = 'messages = "."\nrole = "by"\ncontent = "x"\n[roles]\nBo = "user"\nGPT = "user"'
    record = [{"by": "Bo", "x": "q"}, {"by": "GPT", "x": "a"}]
    assert read(text, record) == [[("user", "q"), ("user", "a")]]
    assert read(text, record, gpt="assistant") == [QA]


def test_other_fields_of_a_record() -> None:
    text = 'messages = "d.t"\nrole = "by"\ncontent = "x"\nsystem = "d.s"\ntools = "d.f"\nid = "nr"'
    record = {
        "d": {"t": [{"by": "user", "x": "q", "weight": 2, "mood": "glad"}], "s": "Hi", "f": [{"name": "f"}], "k": 1},
        "nr": 7,
        "topic": "x",
    }
    before = json.dumps(record)
    (draft,) = parse_mapping(text, "my.toml").parse_record(record)
    assert (draft.id, draft.tools, draft.extra) == ("7", [{"name": "f"}], {"d": {"k": 1}, "topic": "x"})
    assert draft.ignored == ["d.t[].mood"]
    assert draft.messages[1] == {"role": "user", "content": "q", "weight": 2}
    assert json.dumps(record) == before


def test_paths() -> None:
    record = {"a": {"b": [{"c": 1}]}, "a.b": 2}
    assert (value_at(record, "a.b"), value_at(record, "a.b.0.c"), value_at(record, ".")) == (2, 1, record)
    assert remove_at(record, "a.b") == {"a": {"b": [{"c": 1}]}}
    assert remove_at({"a": {"b": 1, "c": 2}}, "a.b") == {"a": {"c": 2}}
    assert remove_at({"a": [1], "d": 3}, "a.0") == {"d": 3}
    assert remove_at(record, "x.y") == record


# ---- invalid files ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('mesages = "t"', "found the key mesages; expected one of messages, role"),
        ("messages = 3", "messages is 3; expected a path"),
        ('messages = ""', "messages is ''; expected a path"),
        ('messages = "t"\nstrip = "yes"', "strip is 'yes'; expected true or false"),
        ('messages = "t"\nassistant = "third"', "assistant is 'third'; expected 'second', 'first', 'both'"),
        ('messages = "t"\nexchange = ["a"]', "exchange is ['a']; expected the fields of an exchange"),
        ('messages = "t"\nexchange = ["a", "a"]', "expected the fields of an exchange"),
        ('messages = "t"\nexchange = ["a", "b"]\ncontent = "c"', "found exchange with role or content"),
        ('messages = "t"\nroles = "user"', "roles is 'user'; expected a table"),
        ('messages = "t"\n[roles]\nA = "boss"', "roles.A is 'boss'; expected one of system, user"),
        ('messages = "t"\n[roles]\nA = ["user"]', "roles.A is ['user']; expected one of system, user"),
        ('messages = "t"\n[roles]\nA = "user"\na = "assistant"', "roles has 'a' twice"),
        ('messages = "t"\ntext = "t"', "found messages and text; expected exactly one of"),
        ('role = "r"', "found none of them; expected exactly one of"),
        ('messages = "t"\nrole = "r"', "content is missing"),
        ('messages = "t"\nseparator = "|"', "found separator with messages; expected it only with text"),
        ('text = "t"', "separator is missing"),
        ('group = "t"', "content is missing"),
        ("messages = ", "expected TOML"),
    ],
)
def test_invalid_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_mapping(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_mapping(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'messages = "\xe9"')
    with pytest.raises(UsageError, match="not UTF-8"):
        load_mapping(tmp_path / "latin.toml")


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
names = st.dictionaries(words.map(lambda word: word.strip().lower()), st.sampled_from(ROLES), max_size=3)
common = {
    "system": st.none() | words, "tools": st.none() | words, "id": st.none() | words, "strip": st.booleans(),
    "join": st.booleans(), "assistant": st.sampled_from(["second", "first", "both"]), "roles": names,
}  # fmt: skip
mappings = st.one_of(
    st.builds(Mapped, messages=words, content=words, role=st.none() | words, **common),
    st.builds(Mapped, messages=words, exchange=st.tuples(words, words).filter(lambda two: two[0] != two[1]), **common),
    st.builds(Mapped, text=words, separator=words, speaker_separator=st.none() | words, **common),
    st.builds(Mapped, group=words, content=words, role=st.none() | words, order=st.none() | words, **common),
)


@given(mappings)
def test_a_mapping_written_as_a_file_is_read_back(mapped: Mapped) -> None:
    assert parse_mapping(mapping_text(mapped), "my.toml") == mapped


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("atx1.") | st.text(max_size=2), inner),
    max_leaves=12,
)
small = st.sampled_from(["a", "t", "x", ".", "1", "a.x", "t.1", "t.0.x"])
probing = st.one_of(
    st.builds(Mapped, messages=small, content=small, role=st.none() | small, system=st.none() | small, id=small),
    st.builds(Mapped, messages=small, exchange=st.just(("a", "x")), tools=small),
    st.builds(Mapped, messages=small),
    st.builds(Mapped, text=small, separator=st.just("|"), speaker_separator=st.sampled_from([None, ":"])),
    st.builds(Mapped, group=small, content=small, role=st.none() | small, order=small),
)


@given(probing, values)
def test_hostile_records_are_read_or_refused(mapped: Mapped, value: Any) -> None:
    assert isinstance(mapped.matches(value), bool)
    assert all(isinstance(talk, str | list) for talk in conversations(mapped, [value, value]))


# ---- the documentation ----


def documented() -> list[tuple[Any, str]]:
    """The mappings of docs/mapping.md, each with the records above it."""
    found, records = [], None
    for kind, body in re.findall(r"```(json|toml|text)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        if kind == "toml":
            found.append((records, body))
        elif kind == "json":
            records = [json.loads(body)]
        else:
            header, *lines = (line.split(",") for line in body.splitlines())
            records = [dict(zip(header, line, strict=True)) for line in lines]
    return found


def test_documented_mappings_read_the_records_above_them() -> None:
    """The first seven have records."""
    found = documented()
    assert len(found) == 9
    for at, (records, text) in enumerate(found[:7]):
        talks = read(text, *records)
        assert len(talks) == (2 if at == 6 else 1)
        for talk in talks:
            assert {role for role, _ in talk} == {"user", "assistant"}
            assert all(content for _, content in talk)
    for _, text in found[7:]:
        parse_mapping(text, "docs/mapping.md")


def test_every_key_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in text and f"`[{key}]`" not in text] == []
