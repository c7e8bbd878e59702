"""Random conversations as raw files of every format, layout and compression, valid or damaged, convert and pack.

Valid ones come out word for word. Damaged ones are read or refused; none is lost, and none raises an unhandled
exception. `benchmarks/fuzz.py` does the same for longer, guided by code coverage.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.conversation import CONVERSATION_SCHEMA, ROLE_NAMES
from ismdata.convert.canonical import Rules
from ismdata.convert.corpus_format import Choices
from ismdata.convert.explain import explain
from ismdata.convert.formats import registry
from ismdata.convert.mapping_file import parse_mapping
from ismdata.convert.parts import FormatChoice as Reading
from ismdata.convert.pipeline import ConvertReport, convert
from ismdata.data.verification import verify
from ismdata.errors import DataError
from ismdata.pack.pipeline import pack
from tests.pack.test_pack import bytes_tokenizer as bytes_tokenizer  # a fixture
from tests.support.fuzz_checks import Memory, check_file, check_row
from tests.support.mutations import mutated_bytes, mutated_value
from tests.support.raw_corpora import (
    ANCHOR,
    ESCAPING,
    FORMATS,
    PACKED,
    A,
    Format,
    S,
    Talk,
    U,
    is_unicode,
    packed,
    written,
)

pytestmark = pytest.mark.slow  # draws damaged corpora

#: The same examples in each run; benchmarks/fuzz.py tries new ones.
QUICK = settings(derandomize=True, deadline=None, database=None)

AWKWARD = (
    "", " ", "\n", "\x00", "a\tb", "a\nb\r\n", "\r", "\x1c", "\x85", "\u2028", "\ufeff", "\ufffe", "\U0010ffff",
    "\ud800", "\udc00x", "💡", "你好", "e\u0301", "\\", '"', "'", "{", "[1]", "null", "#", "- a", "a: b", "&a", "1 2",
    "__eou__", "|EOM|", "Ann: a", "Human: a\n\nAssistant: b", "### Human: a", "your persona: i am", "</s>",
    "<|im_end|>", "<|im_start|>system\nyes<|im_end|>", "<|endoftext|>", "<eoh>", "None", "long " * 500,
)  # fmt: skip
texts = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8), st.text(alphabet=st.characters(), max_size=8))
plain_texts = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Zs"]), min_size=1, max_size=12)


@st.composite
def talks(draw: Any) -> Talk:
    """A conversation of any shape; common shapes are the most frequent."""
    words = draw(st.sampled_from([texts, plain_texts, plain_texts]))
    shape = draw(st.sampled_from(["pairs", "pairs", "pairs", "open", "any", "long"]))
    if shape == "any":
        return tuple(draw(st.lists(st.tuples(st.sampled_from([S, U, A]), words), min_size=1, max_size=5)))
    count = draw(st.integers(1, 3)) * 2 - (shape == "open")
    system = [(S, draw(words))] if draw(st.booleans()) else []
    turns = [((U, A)[at % 2], draw(words)) for at in range(count)]
    return (*system, *turns * (60 if shape == "long" else 1))


corpora = st.lists(talks(), min_size=2, max_size=8)


def file_of(form: Format, corpus: list[Talk], layout: str, **how: Any) -> tuple[list[Talk], str, bytes]:
    """The conversations that the format and the layout can hold, and a file of them; the first suits all formats."""
    kept = [ANCHOR, *(talk for talk in corpus if form.holds(talk) and (layout in ESCAPING or is_unicode(talk)))]
    return kept, *written(form, kept, layout, **how)


def converted(folder: Path, name: str, data: bytes, **options: Any) -> ConvertReport:
    """Convert, or raise DataError and leave nothing."""
    folder.mkdir()
    (folder / name).write_bytes(data)
    try:
        return convert([str(folder / name)], folder / "out", workers=1, **options)
    except DataError as error:
        assert str(error)
        assert [path.name for path in folder.iterdir()] == [name]
        raise


def rows_of(report: ConvertReport) -> list[dict[str, Any]]:
    """The rows of a converted folder, which must be valid."""
    parts = [report.output / name for name in report.parts] or [report.output]
    for part in parts:
        checked = verify(part)
        assert checked.ok, checked.problems
    assert report.read == report.written + sum(report.quarantined.values())
    lines = [line for part in parts for line in (part / "quarantine.jsonl").read_bytes().splitlines()]
    assert Counter(json.loads(line)["reason"] for line in lines) == report.quarantined
    rows: list[dict[str, Any]] = []
    for shard in [shard for part in parts for shard in sorted(part.glob("*.arrow"))]:
        table = pa.ipc.open_stream(shard.read_bytes()).read_all()
        assert table.schema.equals(CONVERSATION_SCHEMA)
        rows += table.to_pylist()
    assert len(rows) == report.written
    return rows


def test_there_is_a_writer_for_each_reader() -> None:
    assert FORMATS.keys() == registry.FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
@settings(QUICK, max_examples=5)
@given(data=st.data())
def test_what_goes_in_comes_out(name: str, data: Any) -> None:
    form = FORMATS[name]
    layout = data.draw(st.sampled_from(form.layouts))
    corpus, ending, content = file_of(form, data.draw(corpora), layout, escaped=data.draw(st.booleans()))
    if layout != "parquet" and data.draw(st.booleans()):
        content = b"\xef\xbb\xbf" + content
    file, content = packed(content, f"corpus{ending}", data.draw(st.sampled_from([*PACKED])))
    with tempfile.TemporaryDirectory() as scratch:
        report = converted(Path(scratch) / "c", file, content, **form.options)
        said = [[(message["role"], message["content"]) for message in row["messages"]] for row in rows_of(report)]
    expected = [form.comes_out(talk) for talk in corpus]
    assert said == [messages for messages in expected if messages is not None]
    assert report.read == len(corpus)
    assert report.sources[0].format == name


@pytest.mark.parametrize("name", ["oasst", "dialogue_rows"])
def test_rows_of_a_parquet_file_are_grouped(name: str, tmp_path: Path) -> None:
    report = converted(tmp_path / "c", "x.parquet", written(FORMATS[name], [ANCHOR, ANCHOR], "parquet")[1])
    assert len(rows_of(report)) == 2


def _broken_parquet() -> bytes:
    """A Parquet file with a text that is not UTF-8, which writers do not check."""
    content = written(FORMATS["sharegpt"], [ANCHOR], "parquet")[1]
    return content.replace(b"Until six.", b"Until \xffix.")


def _zip_with_a_wrong_offset() -> bytes:
    content = packed(b'["a", "b"]', "x.jsonl", "zip")[1]
    end = content.rindex(b"PK\x05\x06")
    return content[: end + 16] + b"\xff\xff\x00\x00" + content[end + 20 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_broken_parquet(), "rows 1 to 1: .*UTF"),
        (_zip_with_a_wrong_offset(), "zip|unpacked"),
        (b"[null]", "the first record is"),
        (b"\n" * 64 + b"Hi", "the first record is"),  # took 2 ** 32 times as long as 32 blank lines
        (b'["a", ' + b"[" * 990 + b"]" * 990 + b"]", "nested more than 800 levels deep"),
    ],
    ids=["parquet", "zip", "null", "blank lines", "deep"],
)
def test_findings_of_the_fuzzer_are_errors(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        converted(tmp_path / "c", "x", content)


@pytest.mark.parametrize("line", ["{a\tb}", '{"a": 1}', "[1]\tx", "{}\t[]"])
def test_a_line_of_text_may_look_like_json(line: str, tmp_path: Path) -> None:
    report = converted(tmp_path / "c", "x.txt", f"Hi\tHo\n{line}\n".encode())
    assert report.read == 2
    assert report.sources[0].format == "tsv_pairs"


def test_a_member_without_a_name_is_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        member = zipfile.ZipInfo("x")
        member.filename = ""
        archive.writestr(member, b"Hi\tHo")
    assert len(rows_of(converted(tmp_path / "c", "x.zip", out.getvalue()))) == 1


@st.composite
def damaged(draw: Any, name: str) -> bytes:
    """A file of a format, damaged in its records, its bytes, or both."""
    form, rng = FORMATS[name], random.Random(draw(st.integers(0, 1 << 32)))
    layout = draw(st.sampled_from(form.layouts))
    _, _, content = file_of(form, draw(st.lists(talks(), max_size=3)), layout, escaped=draw(st.booleans()))
    if layout in ("lines", "array", "entries", "splits") and rng.random() < 0.7:
        pieces = content.split(b"\n") if layout == "lines" else [content]
        at = rng.randrange(len(pieces))
        if pieces[at]:
            value = json.loads(pieces[at])
            for _ in range(rng.choice([1, 1, 2, 5])):
                value = mutated_value(value, rng)
            pieces[at] = json.dumps(value, indent=rng.choice([None, None, 1])).encode()
        content = b"\n".join(pieces)
    if rng.random() < 0.5:
        other = rng.choice([*FORMATS.values()])
        splice = written(other, [ANCHOR], rng.choice(other.layouts))[1]
        for _ in range(rng.choice([1, 2, 4])):
            content = mutated_bytes(content, rng, splice)
    if rng.random() < 0.1:
        content = mutated_bytes(packed(content, "x", rng.choice([*PACKED]))[1], rng)
    return content


CHOICES = (
    Choices(roles=ROLE_NAMES, preference="chosen"),
    Choices(roles=ROLE_NAMES, assistant="both", tree="best", preference="rejected"),
)
names = st.sampled_from(["x.jsonl", "x.csv", "x.yaml", "x"])


@pytest.mark.parametrize("name", FORMATS)
@settings(QUICK, max_examples=20)
@given(data=st.data())
def test_both_parsers_read_damaged_files_alike(name: str, data: Any) -> None:
    content, choices, file = data.draw(damaged(name)), data.draw(st.sampled_from(CHOICES)), data.draw(names)
    for format in (name, "auto"):
        check_file(content, file, Reading(name=format, choices=choices), Rules(roles=ROLE_NAMES, join=True))


@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_damaged_files_are_converted_whole_or_leave_nothing(data: Any) -> None:
    name = data.draw(st.sampled_from([*FORMATS]))
    content, file = data.draw(damaged(name)), data.draw(names)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = converted(Path(scratch) / "c", file, content, assistant="both", preference="chosen")
        except DataError:
            return
        for row in rows_of(report):
            check_row(row)


@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_explain_describes_any_file(data: Any) -> None:
    content = data.draw(damaged(data.draw(st.sampled_from([*FORMATS]))))
    source: Any = Memory(data=content, name=data.draw(names))
    try:
        found = explain(source, Reading(choices=data.draw(st.sampled_from(CHOICES))))
    except DataError as error:
        assert str(error)
        return
    assert found.text()
    assert json.dumps(found.as_json())
    if found.mapping is not None:
        parse_mapping(found.mapping, "x.toml")


@settings(QUICK, max_examples=3)
@given(corpus=st.lists(talks(), min_size=4, max_size=12), over_long=st.sampled_from(["split", "drop", "truncate"]))
def test_converted_conversations_are_packed_or_quarantined(
    bytes_tokenizer: Path, corpus: list[Talk], over_long: Any
) -> None:
    _, ending, content = file_of(FORMATS["messages"], corpus, "lines")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report = converted(folder / "c", f"x{ending}", content)
        done = pack(
            [report.output], folder / "p", tokenizer=str(bytes_tokenizer), seq_len=256, over_long=over_long, workers=1
        )
        assert done.counts["read"] == report.written
        assert done.counts["read"] == done.counts["packed"] + sum(done.counts["quarantined"].values())
        checked = verify(folder / "p")
        assert checked.ok, checked.problems
