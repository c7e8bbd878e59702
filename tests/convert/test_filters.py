"""The filters, compared with filters that look at one conversation at a time."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.conversation import FORMAT, REASONS
from ismdata.convert.against import OtherCorpus
from ismdata.convert.canonical import Rules
from ismdata.convert.corpus_format import Choices
from ismdata.convert.digests import Digests, digests
from ismdata.convert.filters import Cleaner, conversations, first_match, turn_counts
from ismdata.convert.options import Cleaning
from ismdata.convert.parts import FormatChoice
from ismdata.data.index import describe_file, entries, write_index
from ismdata.errors import DataError, UsageError
from tests.support.talks import FEW, MANY, pieces, said, table, talk


def cleaned(
    cleaning: Cleaning, blocks: Sequence[pa.Table], *, stop: int | None = None, against: Any = None
) -> tuple[list[bool], list[tuple[str, str]], int]:
    """Which conversations are kept, the reasons of the others, and the number of repeats.

    With `stop`, the run dies after that many blocks and is resumed.
    """
    kept: list[bool] = []
    dropped: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        cleaner = Cleaner(cleaning, Path(folder), against=against)
        for at, block in enumerate(blocks):
            if at == stop:
                rows = {name: column.rows for name, column in cleaner.columns.items()}
                cleaner.apply(block)  # not recorded, so lost
                for column in cleaner.columns.values():
                    column.close()
                cleaner = Cleaner(cleaning, Path(folder), against=against, keep=rows)
            keep, refused = cleaner.apply(block)
            assert len(keep) == len(block) and keep.sum() + len(refused) == len(block)
            assert [record["source"] for record in conversations(block.filter(pa.array(~keep)))] == [
                entry.source for entry in refused
            ]
            kept += keep.tolist()
            dropped += [(entry.reason, entry.detail) for entry in refused]
        return kept, dropped, cleaner.duplicates()


def reasons(rows: Sequence[dict[str, Any]], cleaning: Cleaning, other: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Why each conversation is dropped, "" if it is kept, decided one at a time."""
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
def test_filters_decide_as_one_at_a_time_would(
    rows: list[dict[str, Any]], borders: list[int], cleaning: Cleaning, other: list[dict[str, Any]] | None
) -> None:
    against = None if other is None else digests(table(other))
    kept, dropped, duplicates = cleaned(cleaning, list(pieces(table(rows), borders)), against=against)
    expected = reasons(rows, cleaning, other or [])
    assert kept == [not reason for reason in expected]
    assert [reason for reason, _ in dropped] == [reason for reason in expected if reason]
    assert {reason for reason, _ in dropped} <= REASONS.keys()
    assert duplicates == len(rows) - len({said(row) for row in rows})


#: Conversations of which some are similar: a story with some of its words changed.
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


def test_details_name_the_message_and_the_option(tmp_path: Path) -> None:
    rows = [talk("hello", number=0), talk("hello", "well, foo bar", number=1), talk("a", "b", number=2)]
    rows += [talk("a", "b", number=3), talk("c", "d", number=4)]
    against = digests(table(rows[4:]))
    cleaner = Cleaner(Cleaning(dedup="exact", min_turns=2, exclude=("foo",)), tmp_path, against=against)
    kept, dropped = cleaner.apply(table(rows))
    assert kept.tolist() == [False, False, True, False, False]
    assert [(entry.source, entry.reason, entry.detail) for entry in dropped] == [
        ("talks:0", "too_few_turns", "1 user and assistant messages; expected at least 2 (--min-turns)"),
        ("talks:1", "excluded", "message 2 matches --exclude 'foo'"),
        ("talks:3", "duplicate", "the same as an earlier conversation"),
        ("talks:4", "in_other", "a corpus of --against has the same conversation"),
    ]
    assert dropped[0].record == rows[0]
    assert cleaner.duplicates() == 1


@FEW
@given(MANY, st.sampled_from(["", "a", "b|ab", ".", ".b|你", r"\.", "💡", "\n", "\x00", "a.", r"b\|"]))
def test_plain_patterns_match_the_same_in_both_engines(rows: list[dict[str, Any]], pattern: str) -> None:
    compiled = re.compile(pattern)
    by_re = re.compile(f"(?:{pattern})")  # not plain, so `re` matches it
    assert first_match(table(rows), compiled).tolist() == first_match(table(rows), by_re).tolist()
    expected = [
        next(
            (k for k, m in enumerate(row["messages"], 1) if m["content"] is not None and compiled.search(m["content"])),
            0,
        )
        for row in rows
    ]
    assert first_match(table(rows), compiled).tolist() == expected


def test_patterns_match_unicode() -> None:
    """RE2 alone would match only ASCII here."""
    rows = table([talk("Ещё раз"), talk("Gruß"), talk("x" * 2000 + "y")])
    assert first_match(rows, re.compile(r"\bраз\b")).tolist() == [1, 0, 0]
    assert first_match(rows, re.compile(r"(?i)GRUß$")).tolist() == [0, 1, 0]
    assert first_match(rows, re.compile("x" * 1999 + "y")).tolist() == [0, 0, 1]


def test_turns_are_user_and_assistant_messages() -> None:
    row = talk("a", "b", "c")
    row["messages"] += [{"role": "tool", "content": "d"}, {"role": "system", "content": "e"}]
    assert turn_counts(table([row, talk(), talk("a")])).tolist() == [3, 0, 1]


def test_near_tells_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UsageError, match=r"pip install ismdata\[dedup\]"):
        Cleaner(Cleaning(dedup="near"), tmp_path)


def test_near_drops_what_is_similar_to_a_kept_conversation(tmp_path: Path) -> None:
    story = " ".join(STORY)
    rows = [talk(story, "Yes.", number=0), talk(story.upper(), "Yes!", number=1), talk(story, "Yes.", number=2)]
    cleaner = Cleaner(Cleaning(dedup="near"), tmp_path)
    kept, dropped = cleaner.apply(table([*rows, talk("Another story.", "Indeed.", number=3)]))
    assert kept.tolist() == [True, False, False, True]
    assert [(entry.reason, entry.detail) for entry in dropped] == [
        ("near_duplicate", "about 100% similar to conversation 0 of those kept, counted from 0"),
        ("duplicate", "the same as an earlier conversation"),
    ]
    assert cleaner.columns["signatures"].rows == 2


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


def folder_digests(folder: Path) -> Digests:
    other = OtherCorpus.find(str(folder))
    return other.digests(FormatChoice(choices=Choices(roles={})), Rules(roles={}))


def test_against_reads_all_shards(tmp_path: Path) -> None:
    rows = table([talk("a"), talk("b", "c"), talk("d")])
    folder = converted(tmp_path / "other", [rows.slice(0, 2), rows.slice(2)])
    assert np.array_equal(folder_digests(folder), digests(rows))
    assert folder_digests(converted(tmp_path / "empty", [])).shape == (0, 2)


def test_against_refuses_other_columns(tmp_path: Path) -> None:
    folder = converted(tmp_path / "other", [pa.table({"text": ["a"]})])
    with pytest.raises(
        DataError, match=r"conversations-00000.arrow: columns are text string; expected id string not null, source"
    ):
        folder_digests(folder)


def test_against_refuses_a_file_that_is_no_stream(tmp_path: Path) -> None:
    folder = converted(tmp_path / "other", [table([talk("a")])])
    path = folder / "conversations-00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="not a readable Arrow stream"):
        folder_digests(folder)
