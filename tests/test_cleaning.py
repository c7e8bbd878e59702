"""Digests, cleaning, sampling and splits against slow versions that are obviously right."""

from __future__ import annotations

import itertools
import json
import re
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.cleaning import Cleaner, Cleaning, against_digests, conversations, first_match, turn_counts
from ismdata.conversation import CONVERSATION_SCHEMA, FORMAT, REASONS, ROLES
from ismdata.digests import DigestSet, digests, repeated, repeats
from ismdata.errors import DataError, UsageError
from ismdata.folders import describe_file, entries, write_index
from ismdata.near import NearIndex, shingles, words
from ismdata.sampling import parse_split, sampled, split_of

#: Few and awkward texts, so that conversations collide in all but their structure.
TEXTS = st.sampled_from(["", "a", "b", "ab", "ba", "a\x00", "你", "💡", "\n"])
MAYBE = st.none() | TEXTS
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": MAYBE},
    optional={
        "train": st.booleans(),
        "weight": st.sampled_from([0.0, 1.0]),
        "name": MAYBE,
        "tool_calls": MAYBE,
        "tool_call_id": MAYBE,
        "reasoning_content": MAYBE,
    },
)
CONVERSATIONS = st.fixed_dictionaries(
    {"id": TEXTS, "source": TEXTS, "messages": st.lists(MESSAGES, max_size=3)},
    optional={"tools": MAYBE, "meta": MAYBE},
)
MANY = st.lists(CONVERSATIONS, max_size=12)


#: Two cores and slow oracles.
FEW = settings(deadline=None, max_examples=50)


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), CONVERSATION_SCHEMA)


def talk(*contents: str | None, number: int = 0, **fields: Any) -> dict[str, Any]:
    """A conversation of user and assistant in turn."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"id": f"t{number}", "source": f"talks:{number}", "messages": messages, **fields}


def said(row: dict[str, Any], *, roles: bool = True) -> str:
    """What a conversation says, as JSON: the oracle of its digest."""
    kept = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")[0 if roles else 1 :]
    return json.dumps([[[message.get(key) for key in kept] for message in row["messages"]], row.get("tools")])


def spelled(row: dict[str, Any], *, roles: bool = True) -> bytes:
    """What is hashed, piece by piece."""

    def word(number: int) -> bytes:
        return struct.pack("<q", number)

    messages, names = row["messages"], ("name", "tool_calls", "tool_call_id", "reasoning_content")
    found = word(len(messages) << 1 | (row.get("tools") is not None))
    for message in messages:
        texts = [message["content"] or "", *(message.get(name) for name in names)]
        flags = sum(8 << bit for bit, text in enumerate(texts[1:]) if text is not None)
        flags |= ROLES.index(message["role"]) if roles else 0
        flags |= 128 if message["content"] is not None else 0
        found += word(len(texts[0].encode()) << 8 | flags)
    found += "".join(message["content"] or "" for message in messages).encode()
    for name in names:
        held = [message[name].encode() for message in messages if message.get(name) is not None]
        found += b"".join([*(word(len(text)) for text in held), *held])
    return found + (row.get("tools") or "").encode()


def pieces(rows: pa.Table, borders: Sequence[int]) -> Iterator[pa.Table]:
    edges = [0, *sorted(border % (len(rows) + 1) for border in borders), len(rows)]
    return (rows.slice(low, high - low) for low, high in itertools.pairwise(edges))


# digests


@FEW
@given(MANY, st.booleans())
def test_equal_digests_are_equal_conversations(rows: list[dict[str, Any]], roles: bool) -> None:
    found = [digest.tobytes() for digest in digests(table(rows), roles=roles)]
    expected = [said(row, roles=roles) for row in rows]
    for (one, one_said), (other, other_said) in itertools.combinations(zip(found, expected, strict=True), 2):
        assert (one == other) == (one_said == other_said)


@FEW
@given(MANY, st.booleans())
def test_digests_hash_the_spelling(rows: list[dict[str, Any]], roles: bool) -> None:
    expected = b"".join(xxhash.xxh3_128_digest(spelled(row, roles=roles)) for row in rows)
    assert digests(table(rows), roles=roles).astype(">u8").tobytes() == expected


@FEW
@given(MANY, st.lists(st.integers(0, 20), max_size=4))
def test_digests_do_not_depend_on_chunks_and_slices(rows: list[dict[str, Any]], borders: list[int]) -> None:
    whole = table(rows)
    alone = [digests(table([row])) for row in rows]
    expected = np.concatenate([np.empty((0, 2), np.uint64), *alone])
    cut = list(pieces(whole, borders))
    assert np.array_equal(digests(whole), expected)
    assert np.array_equal(digests(pa.concat_tables(cut)), expected)
    assert np.array_equal(np.concatenate([digests(piece) for piece in cut]), expected)


def test_digests_ignore_what_lies_under_a_null() -> None:
    """Arrow leaves open what the bytes of a null value are."""
    [rows] = table([talk("a", None, "b"), talk("c")]).to_batches()
    messages = rows.column("messages")
    contents = messages.values.field("content")
    offsets = pa.py_buffer(np.array([0, 1, 4, 5, 6], np.int32))
    hidden = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"axyzbc"), contents.buffers()[0])
    assert hidden.to_pylist() == ["a", None, "b", "c"]
    fields = [
        hidden if field.name == "content" else messages.values.field(field.name) for field in messages.type.value_type
    ]
    values = pa.StructArray.from_arrays(fields, fields=list(messages.type.value_type))
    lists = pa.ListArray.from_arrays(messages.offsets, values, type=messages.type)
    changed = pa.table(rows).set_column(2, CONVERSATION_SCHEMA.field("messages"), lists)
    assert np.array_equal(digests(changed), digests(pa.table(rows)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(talk("a", "bc"), talk("ab", "c"), id="border"),
        pytest.param(talk("a", None), talk("a", ""), id="null"),
        pytest.param(talk("a"), talk("a", ""), id="count"),
        pytest.param(talk("a"), talk("a", tools="[]"), id="tools"),
        pytest.param(talk("a", tools=None), talk("a", tools=""), id="no tools"),
    ],
)
def test_digests_tell_structure(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = digests(table([one, other]))
    assert not np.array_equal(first, second)


def test_digests_stay() -> None:
    """Splits and unfinished runs rely on it: a change here is a new format."""
    rows = [talk("Any hammers left?", "Yes, 14."), {**talk("你好", None), "tools": "[]"}]
    rows[1]["messages"][1]["tool_calls"] = '[{"function": {"name": "stock"}}]'
    assert [f"{a:016x}{b:016x}" for a, b in digests(table(rows)).tolist()] == GOLDEN
    assert np.array_equal(
        digests(table([rows[0]]), roles=False),
        digests(table([{**rows[0], "messages": [{**m, "role": "user"} for m in rows[0]["messages"]]}]), roles=False),
    )


GOLDEN = [
    "64c98b943a7ec7cfd6dbb786127e3a31",
    "6a629125e33588e397661039bf756563",
]

#: Digests that share halves, which 128 random bits never do.
CLOSE = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30)


@FEW
@given(st.lists(CLOSE, max_size=6))
def test_digest_set_is_a_set(blocks: list[list[tuple[int, int]]]) -> None:
    found, oracle = DigestSet(), set()
    for block in blocks:
        array = np.array(block, np.uint64).reshape(-1, 2)
        assert found.among(array).tolist() == [digest in oracle for digest in block]
        new = []
        for digest in block:
            new.append(digest not in oracle)
            oracle.add(digest)
        assert found.add(array).tolist() == new


@FEW
@given(CLOSE, st.integers(1, 4))
def test_repeats_counts_all_but_the_first(rows: list[tuple[int, int]], at_once: int) -> None:
    spread = np.array(rows, np.uint64).reshape(-1, 2) << np.uint64(62)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ismdata.digests._SORTED", at_once)
        assert repeats(spread) == len(rows) - len(set(rows))
    assert repeated(spread).tolist() == [row in rows[:at] for at, row in enumerate(rows)]


# cleaning


def cleaned(
    cleaning: Cleaning, blocks: Sequence[pa.Table], *, stop: int | None = None, against: Any = None
) -> tuple[list[bool], list[tuple[str, str]], int]:
    """What is kept, the others' reasons, and the repeats; with `stop`, by a run that dies after that many blocks and
    one that goes on from there.
    """
    kept: list[bool] = []
    left: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        cleaner = Cleaner(cleaning, Path(folder), against=against)
        for at, block in enumerate(blocks):
            if at == stop:
                rows = {name: column.rows for name, column in cleaner.columns.items()}
                cleaner.apply(block)  # after the checkpoint: lost
                for column in cleaner.columns.values():
                    column.close()
                cleaner = Cleaner(cleaning, Path(folder), against=against, keep=rows)
            mask, out = cleaner.apply(block)
            assert len(mask) == len(block) and mask.sum() + len(out) == len(block)
            assert [record["source"] for record in conversations(block.filter(pa.array(~mask)))] == [
                entry.source for entry in out
            ]
            kept += mask.tolist()
            left += [(entry.reason, entry.detail) for entry in out]
        return kept, left, cleaner.duplicates()


def reasons(rows: Sequence[dict[str, Any]], cleaning: Cleaning, other: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Why each conversation is left out, "" where it is kept: one after the other."""
    seen: set[str] = set()
    elsewhere = {said(row) for row in other}
    found = []
    for row in rows:
        turns = [message for message in row["messages"] if message["role"] in ("user", "assistant")]
        texts = [message["content"] for message in row["messages"] if message["content"] is not None]
        if len(turns) < cleaning.min_turns:
            found.append("too_few_turns")
        elif any(re.search(pattern, text) for pattern in cleaning.exclude for text in texts):
            found.append("excluded")
        elif said(row) in elsewhere:
            found.append("in_other")
        elif cleaning.dedup and said(row) in seen:
            found.append("duplicate")
        else:
            found.append("")
        seen.add(said(row))
    return found


CLEANINGS = st.builds(
    Cleaning,
    dedup=st.sampled_from([None, "exact"]),
    min_turns=st.integers(0, 3),
    exclude=st.lists(st.sampled_from(["b", "a|你", r"^ab$", r"\w\s", "(?i)BA", ".a", "\\.", "x{,1}b"]), max_size=2).map(
        tuple
    ),
)


@FEW
@given(MANY, st.lists(st.integers(0, 20), max_size=3), CLEANINGS, st.none() | MANY)
def test_cleaning_one_by_one(
    rows: list[dict[str, Any]], borders: list[int], cleaning: Cleaning, other: list[dict[str, Any]] | None
) -> None:
    against = None if other is None else digests(table(other))
    kept, left, duplicates = cleaned(cleaning, list(pieces(table(rows), borders)), against=against)
    expected = reasons(rows, cleaning, other or [])
    assert kept == [not reason for reason in expected]
    assert [reason for reason, _ in left] == [reason for reason in expected if reason]
    assert {reason for reason, _ in left} <= REASONS.keys()
    assert duplicates == len(rows) - len({said(row) for row in rows})


#: Talks of which some are alike: a story with some of its words changed.
STORY = [f"word{k}" for k in range(60)]
ALIKE = st.lists(
    st.builds(
        lambda changed, start: talk(" ".join(STORY[start:30] + changed + STORY[30:]), "Yes."),
        st.lists(st.sampled_from(["x", "y"]), max_size=3),
        st.sampled_from([0, 0, 10, 30]),
    ),
    max_size=12,
)


@FEW
@given(ALIKE, st.lists(st.integers(0, 20), min_size=1, max_size=3), st.sampled_from([None, "exact", "near"]), st.data())
def test_an_interrupted_run_decides_the_same(
    rows: list[dict[str, Any]], borders: list[int], dedup: Any, data: st.DataObject
) -> None:
    blocks = list(pieces(table(rows), borders))
    expected = cleaned(Cleaning(dedup=dedup), [table(rows)])
    stop = data.draw(st.integers(0, len(blocks) - 1))
    assert cleaned(Cleaning(dedup=dedup), blocks, stop=stop) == expected


def test_details_say_what_and_where(tmp_path: Path) -> None:
    rows = [talk("hello", number=0), talk("hello", "well, foo bar", number=1), talk("a", "b", number=2)]
    rows += [talk("a", "b", number=3), talk("c", "d", number=4)]
    against = digests(table(rows[4:]))
    cleaner = Cleaner(Cleaning(dedup="exact", min_turns=2, exclude=("foo",)), tmp_path, against=against)
    kept, left = cleaner.apply(table(rows))
    assert kept.tolist() == [False, False, True, False, False]
    assert [(entry.source, entry.reason, entry.detail) for entry in left] == [
        ("talks:0", "too_few_turns", "1 user and assistant messages; expected at least 2 (--min-turns)"),
        ("talks:1", "excluded", "message 2 matches --exclude 'foo'"),
        ("talks:3", "duplicate", "the same as an earlier conversation"),
        ("talks:4", "in_other", "the corpus that --against names has the same"),
    ]
    assert left[0].record == rows[0]
    assert cleaner.duplicates() == 1


@FEW
@given(MANY, st.sampled_from(["", "a", "b|ab", ".", ".b|你", r"\.", "💡", "\n", "\x00", "a.", r"b\|"]))
def test_plain_patterns_mean_the_same_to_both_engines(rows: list[dict[str, Any]], pattern: str) -> None:
    compiled = re.compile(pattern)
    other_road = re.compile(f"(?:{pattern})")
    assert first_match(table(rows), compiled).tolist() == first_match(table(rows), other_road).tolist()
    expected = [
        next(
            (k for k, m in enumerate(row["messages"], 1) if m["content"] is not None and compiled.search(m["content"])),
            0,
        )
        for row in rows
    ]
    assert first_match(table(rows), compiled).tolist() == expected


def test_patterns_know_all_alphabets() -> None:
    """What RE2 alone would take for ASCII."""
    rows = table([talk("Ещё раз"), talk("Gruß"), talk("x" * 2000 + "y")])
    assert first_match(rows, re.compile(r"\bраз\b")).tolist() == [1, 0, 0]
    assert first_match(rows, re.compile(r"(?i)GRUß$")).tolist() == [0, 1, 0]
    assert first_match(rows, re.compile("x" * 1999 + "y")).tolist() == [0, 0, 1]


def test_turns_are_user_and_assistant_messages() -> None:
    row = talk("a", "b", "c")
    row["messages"] += [{"role": "tool", "content": "d"}, {"role": "system", "content": "e"}]
    assert turn_counts(table([row, talk(), talk("a")])).tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"exclude": ("(",)}, "--exclude '\\('", id="open group"),
        pytest.param({"exclude": ("fine", "\udc80")}, "--exclude", id="surrogate"),
        pytest.param({"exclude": ("a{99999999999999999999}",)}, "--exclude", id="huge count"),
        pytest.param({"min_turns": -1}, "--min-turns -1", id="negative"),
        pytest.param({"dedup": "all"}, "--dedup all", id="unknown"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cleaning(**options)


def test_near_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UsageError, match=r"pip install ismdata\[dedup\]"):
        Cleaner(Cleaning(dedup="near"), tmp_path)


# near duplicates


@FEW
@given(st.text(max_size=60))
def test_shingles_are_runs_of_words(text: str) -> None:
    found = words(text)
    runs = {tuple(found[at : at + 5]) for at in range(max(len(found) - 4, 1))}
    assert len(shingles(text)) == len(runs)
    if words(text):
        assert np.array_equal(shingles(text), shingles(f"{text} \n."))


def test_a_script_without_blanks_has_a_word_a_letter() -> None:
    assert words("你好，World!") == ["你", "好", "world"]
    assert words("สวัสดี") == list("สวัสดี")
    assert words("안녕 하세요") == ["안녕", "하세요"]


def jaccard(one: str, other: str) -> float:
    first, second = set(shingles(one).tolist()), set(shingles(other).tolist())
    return len(first & second) / len(first | second)


def test_near_finds_what_is_alike_and_only_that() -> None:
    """Against the exact similarity: all pairs well above the threshold, none well below."""
    rng = np.random.default_rng(5)
    story = [f"w{k}" for k in rng.integers(0, 400, 300)]
    index = NearIndex()
    index.add(index.signature(" ".join(story)))
    index.add(index.signature("something else altogether, 你好, and no more than that"))
    seen = {"near": 0, "far": 0}
    for changes in [0, 1, 2, 3, 4, 15, 20, 30, 60] * 5:
        changed = list(story)
        for place in rng.choice(300, changes, replace=False):
            changed[place] = "other"
        text = " ".join(changed)
        similarity, found = jaccard(" ".join(story), text), index.nearest(index.signature(text))
        if similarity > 0.92:
            assert found is not None and found[0] == 0 and abs(found[1] - similarity) < 0.15
            seen["near"] += 1
        elif similarity < 0.65:
            assert found is None
            seen["far"] += 1
    assert seen["near"] > 5 < seen["far"]


def test_texts_without_words_are_alike_only_when_equal() -> None:
    index = NearIndex()
    for text in ("👍", "", "!!!"):
        assert index.nearest(index.signature(text)) is None
        index.add(index.signature(text))
    assert index.nearest(index.signature("!!!")) == (2, 1.0)


def test_near_leaves_out_what_resembles_what_was_kept(tmp_path: Path) -> None:
    story = " ".join(STORY)
    rows = [talk(story, "Yes.", number=0), talk(story.upper(), "Yes!", number=1), talk(story, "Yes.", number=2)]
    cleaner = Cleaner(Cleaning(dedup="near"), tmp_path)
    kept, left = cleaner.apply(table([*rows, talk("Another story.", "Indeed.", number=3)]))
    assert kept.tolist() == [True, False, False, True]
    assert [(entry.reason, entry.detail) for entry in left] == [
        ("near_duplicate", "about 100% alike: conversation 0 of those kept, counted from 0"),
        ("duplicate", "the same as an earlier conversation"),
    ]
    assert cleaner.columns["signatures"].rows == 2


# samples and splits


@FEW
@given(st.integers(0, 200), st.integers(1, 250), st.integers(-3, 2**70), st.integers(1, 50))
def test_a_sample_has_n_and_does_not_depend_on_chunks(count: int, n: int, seed: int, at_once: int) -> None:
    chosen = sampled(count, n, seed)
    assert chosen.dtype == bool and len(chosen) == count and chosen.sum() == min(n, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ismdata.sampling._CHUNK", at_once)
        assert np.array_equal(sampled(count, n, seed), chosen)


def test_a_larger_sample_holds_the_smaller() -> None:
    assert not (sampled(100, 10, 3) & ~sampled(100, 20, 3)).any()
    assert (sampled(100, 10, 3) != sampled(100, 10, 4)).any()


def test_samples_are_uniform() -> None:
    """Chi-square over places and over neighbouring pairs, for 2,000 fixed seeds: 39 and 19 degrees of freedom."""
    chosen = np.array([sampled(40, 8, seed) for seed in range(2000)])
    expected = 2000 * 8 / 40
    places = chosen.sum(axis=0)
    assert ((places - expected) ** 2 / (expected * (1 - 8 / 40))).sum() * 39 / 40 < 72.1  # p = 0.001 at 72.05
    together = (chosen[:, ::2] & chosen[:, 1::2]).sum(axis=0)
    expected = 2000 * 8 * 7 / (40 * 39)
    assert ((together - expected) ** 2 / expected).sum() < 45.4  # p = 0.001 at 45.31


@pytest.mark.parametrize(
    ("text", "parts"), [("0.98/0.02", (0.98, 0.02)), ("0.8/0.1/0.1", (0.8, 0.1, 0.1)), (" .5/ 5e-1", (0.5, 0.5))]
)
def test_split_is_parsed(text: str, parts: tuple[float, ...]) -> None:
    assert parse_split(text) == parts


@pytest.mark.parametrize(
    "text", ["", "1", "0.9", "0.9/0.2", "1/0", "1.1/-0.1", "nan/1", "inf/0.1", "a/b", "0.25/0.25/0.25/0.25"]
)
def test_split_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="expected two or three positive parts"):
        parse_split(text)


def test_sample_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="--sample 0"):
        sampled(5, 0, 0)


@FEW
@given(MANY, st.lists(st.none() | st.sampled_from(["tree 1", "tree 2"]), min_size=12, max_size=12))
def test_a_duplicate_and_kin_stay_on_one_side(rows: list[dict[str, Any]], kin: list[str | None]) -> None:
    found = split_of(digests(table(rows), roles=False), kin[: len(rows)], (0.5, 0.3, 0.2))
    sides: dict[str, int] = {}
    for row, name, side in zip(rows, kin, found.tolist(), strict=False):
        assert sides.setdefault(name or said(row, roles=False), side) == side


def test_split_parts_have_their_sizes() -> None:
    found = split_of(digests(table([talk(f"talk {k}") for k in range(5000)])), [None] * 5000, (0.7, 0.2, 0.1))
    counts = np.bincount(found, minlength=3)
    expected = np.array([3500, 1000, 500])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # p = 0.001


def test_split_puts_the_ends_of_the_range_inside() -> None:
    ends = np.array([[0, 0], [2**64 - 1, 0]], np.uint64)
    assert split_of(ends, [None, None], (0.5, 0.5)).tolist() == [0, 1]
    assert split_of(ends, [None, None], (0.1, 0.2, 0.7)).tolist() == [0, 2]


# the other corpus


def converted(folder: Path, shards: Sequence[pa.Table]) -> Path:
    folder.mkdir()
    files = []
    for number, rows in enumerate(shards):
        path = folder / f"conversations-{number:05d}.arrow"
        with pa.ipc.new_stream(path, rows.schema) as writer:
            writer.write_table(rows)
        files.append(describe_file(path, len(rows)))
    write_index(folder, {"format": FORMAT, "shards": entries(files)})
    return folder


def test_against_reads_all_shards(tmp_path: Path) -> None:
    rows = table([talk("a"), talk("b", "c"), talk("d")])
    folder = converted(tmp_path / "other", [rows.slice(0, 2), rows.slice(2)])
    assert np.array_equal(against_digests(folder), digests(rows))
    assert against_digests(converted(tmp_path / "empty", [])).shape == (0, 2)


def test_against_refuses_other_columns(tmp_path: Path) -> None:
    folder = converted(tmp_path / "other", [pa.table({"text": ["a"]})])
    with pytest.raises(DataError, match=r"conversations-00000.arrow: columns are text; expected id, source"):
        against_digests(folder)


def test_against_refuses_what_is_no_stream(tmp_path: Path) -> None:
    folder = converted(tmp_path / "other", [table([talk("a")])])
    path = folder / "conversations-00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="not a readable Arrow stream"):
        against_digests(folder)
