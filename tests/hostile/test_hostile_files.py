"""Hostile raw files: each line is read or refused individually, and no other line is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from ismdata.convert.pipeline import convert
from ismdata.data.verification import verify

SOUND = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def record(content: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ' + content + b"}]}\n"


#: A line, and what it becomes: the answer that is read, or the reasons for which it may be refused.
LINES: dict[str, tuple[bytes, str | set[str]]] = {
    "NUL escaped": (record(b'"a\\u0000b"'), "a\x00b"),
    "NUL raw": (record(b'"a\x00b"'), {"invalid_json"}),
    "not UTF-8": (record(b'"a\xff\xfeb"'), {"not_utf8", "invalid_json"}),
    "an overlong NUL": (record(b'"a\xc0\x80b"'), {"not_utf8", "invalid_json"}),
    "a surrogate in UTF-8": (record(b'"a\xed\xa0\x80b"'), {"not_utf8", "invalid_json", "lone_surrogate"}),
    "half a pair": (record(b'"a\\ud800b"'), {"lone_surrogate"}),
    "a pair": (record(b'"\\ud83d\\ude00"'), "\U0001f600"),
    "deep": (b"[" * 100_000 + b"]" * 100_000 + b"\n", {"invalid_json", "not_an_object"}),
    "deep inside": (SOUND[:-2] + b', "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", {"invalid_json"}),
    "deep and open": (b'{"a":' * 100_000 + b"\n", {"invalid_json"}),
    "a huge integer": (SOUND[:-2] + b', "id": ' + b"9" * 5000 + b"}\n", {"invalid_json", "invalid_field"}),
    "CRLF": (SOUND[:-1] + b"\r\n", "a"),
    "a key twice": (record(b'"first", "content": "last"'), "last"),
    "messages twice": (b'{"messages": [], ' + SOUND[1:], "a"),
    "line separators": (record(b'"a\xe2\x80\xa8b\xe2\x80\xa9c\xc2\x85d"'), "a\u2028b\u2029c\x85d"),
    "a byte order mark inside": (record(b'"\xef\xbb\xbfa"'), "\ufeffa"),
    "10 MB": (record(b'"' + b"word " * 2_000_000 + b'"'), "word " * 2_000_000),
    "NaN": (SOUND[:-2] + b', "score": NaN}\n', "a"),  # left out of meta
}


@pytest.mark.slow
@pytest.mark.parametrize("around", [0, 3, 2000], ids=["alone", "in a few", "in a block"])
@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_is_read_or_refused_individually(name: str, around: int, tmp_path: Path) -> None:
    """Whichever parser reads the block, the other lines are read."""
    line, expected = LINES[name]
    source, output = tmp_path / "corpus.jsonl", tmp_path / "out"
    source.write_bytes(b"".join([SOUND] * max(around, 1)) + line + SOUND * around)
    report = convert([str(source)], output, format="messages")
    rows = [row for path in sorted(output.glob("*.arrow")) for row in pa.ipc.open_stream(path).read_all().to_pylist()]
    answers = [row["messages"][-1]["content"] for row in rows]
    reasons = [json.loads(line, parse_int=str)["reason"] for line in (output / "quarantine.jsonl").open("rb")]
    assert report.read == max(around, 1) + 1 + around
    if isinstance(expected, str):
        assert answers == ["a"] * max(around, 1) + [expected] + ["a"] * around
        assert reasons == []
    else:
        assert answers == ["a"] * (max(around, 1) + around)
        assert len(reasons) == 1
        assert set(reasons) <= expected
    assert verify(output).problems == []


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b"\xef\xbb\xbf" + SOUND * 2)
    assert convert([str(tmp_path / "corpus.jsonl")], tmp_path / "out").written == 2
