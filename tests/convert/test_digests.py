"""Digests, compared with hashes of bytes that are written out here, and with equality of conversations."""

from __future__ import annotations

import itertools
import struct
import zipfile
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA, ROLES
from ismdata.convert.digests import Digests, DigestSet, count_repeats, digests, is_repeat
from tests.conftest import DATA, needs_data
from tests.support.talks import FEW, MANY, pieces, said, table, talk


def hashed_bytes(row: dict[str, Any], *, roles: bool = True) -> bytes:
    """The bytes that are hashed."""

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
        present = [message[name].encode() for message in messages if message.get(name) is not None]
        found += b"".join([*(word(len(text)) for text in present), *present])
    return found + (row.get("tools") or "").encode()


@FEW
@given(MANY, st.booleans())
def test_equal_digests_are_equal_conversations(rows: list[dict[str, Any]], roles: bool) -> None:
    found = [digest.tobytes() for digest in digests(table(rows), roles=roles)]
    expected = [said(row, roles=roles) for row in rows]
    for (one, one_said), (other, other_said) in itertools.combinations(zip(found, expected, strict=True), 2):
        assert (one == other) == (one_said == other_said)


@FEW
@given(MANY, st.booleans())
def test_digests_hash_these_bytes(rows: list[dict[str, Any]], roles: bool) -> None:
    expected = b"".join(xxhash.xxh3_128_digest(hashed_bytes(row, roles=roles)) for row in rows)
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


def test_digests_ignore_the_bytes_of_a_null() -> None:
    """Arrow does not define them."""
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
def test_different_structures_have_different_digests(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = digests(table([one, other]))
    assert not np.array_equal(first, second)


def test_digests_are_the_stored_ones() -> None:
    """Splits and unfinished runs rely on them: a change here needs a new format number."""
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

#: Digests with equal halves, which 128 random bits practically never have.
CLOSE = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30)


@FEW
@given(st.lists(CLOSE, max_size=6))
def test_digest_set_is_a_set(blocks: list[list[tuple[int, int]]]) -> None:
    found, oracle = DigestSet(), set()
    for block in blocks:
        array = np.array(block, np.uint64).reshape(-1, 2)
        assert found.contains(array).tolist() == [digest in oracle for digest in block]
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
        patch.setattr("ismdata.convert.digests._SORTED", at_once)
        assert count_repeats(spread) == len(rows) - len(set(rows))
    assert is_repeat(spread).tolist() == [row in rows[:at] for at, row in enumerate(rows)]


def dailydialog(split: str) -> tuple[list[str], Digests]:
    """The lines of a file and the digests of its conversations."""
    with zipfile.ZipFile(DATA / "dailydialog" / f"{split}.zip") as archive:
        lines = archive.read(f"{split}/dialogues_{split}.txt").decode().splitlines()
    return lines, digests(table([talk(*line.split("__eou__")[:-1]) for line in lines]))


@needs_data
def test_dailydialog_has_the_repeats_that_its_readme_counts() -> None:
    train, in_train = dailydialog("train")
    other, known = DigestSet(), set(train)
    other.add(in_train)
    assert count_repeats(in_train) == len(train) - len(set(train)) == 569
    for split, within, leaked in [("validation", 5, 69), ("test", 4, 93)]:
        lines, found = dailydialog(split)
        assert count_repeats(found) == len(lines) - len(set(lines)) == within
        assert other.contains(found).sum() == sum(line in known for line in lines) == leaked
