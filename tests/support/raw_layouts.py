"""The bytes of raw corpora: a writer per layout, per compression and per archive."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

#: What a conversation becomes in a file: its records, lines of text or JSON values.
Records = list[Any]

# ---- layouts: the records of each conversation to the bytes of a file ----


_BEYOND_ASCII = re.compile("[^ -~]")


def _dumped(value: Any, escaped: bool, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=escaped, **how)


def _lines(talks: Sequence[Records], escaped: bool, end: str = "\n") -> str:
    return "".join(_dumped(record, escaped) + end for records in talks for record in records)


def _flat(talks: Sequence[Records]) -> Records:
    return [record for records in talks for record in records]


def _splits(talks: Sequence[Records], escaped: bool) -> str:
    half = (len(talks) + 1) // 2
    return _dumped({"train": _flat(talks[:half]), "test": _flat(talks[half:])}, escaped)


def _entries(talks: Sequence[Records], escaped: bool) -> str:
    return _dumped({f"d{number}": record for number, record in enumerate(_flat(talks), 1)}, escaped)


def _values(talks: Sequence[Records], escaped: bool) -> str:
    return "\n".join(_dumped(record, escaped, indent=1) for record in _flat(talks))


def _escape(found: re.Match[str]) -> str:
    return f"\\U{ord(found.group()):08x}"


def _yaml(talks: Sequence[Records], escaped: bool) -> str:
    """A block list of values in flow style: JSON, but for the escapes beyond the first 65,536 characters."""
    texts = [_dumped(record, False) for record in _flat(talks)]
    return "".join(f"- {_BEYOND_ASCII.sub(_escape, text)}\n" for text in texts)


def _table(talks: Sequence[Records], delimiter: str) -> str:
    rows = _flat(talks)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*rows[0]], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet_of(talks: Sequence[Records]) -> bytes:
    out, rows = io.BytesIO(), _flat(talks)
    names = dict.fromkeys(name for row in rows for name in row)
    pyarrow.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), out)
    return out.getvalue()


#: The ending of a file's name, and its text; `escaped` writes JSON in ASCII.
LAYOUTS: dict[str, tuple[str, Callable[[Sequence[Records], bool], str]]] = {
    "lines": (".jsonl", _lines),
    "lines_crlf": (".jsonl", lambda talks, escaped: _lines(talks, escaped, "\r\n")),
    "array": (".json", lambda talks, escaped: _dumped(_flat(talks), escaped)),
    "array_indented": (".json", lambda talks, escaped: _dumped(_flat(talks), escaped, indent=2)),
    "splits": (".json", _splits),
    "entries": (".json", _entries),
    "values": (".json", _values),
    "yaml": (".yaml", _yaml),
    "csv": (".csv", lambda talks, escaped: _table(talks, ",")),
    "tsv": (".tsv", lambda talks, escaped: _table(talks, "\t")),
    "semicolons": (".csv", lambda talks, escaped: _table(talks, ";")),
    "text": (".txt", lambda talks, escaped: "".join(f"{line}\n" for line in _flat(talks))),
    "text_crlf": (".txt", lambda talks, escaped: "".join(f"{line}\r\n" for line in _flat(talks))),
}
#: Layouts in which half of a surrogate pair can be written at all: as an escape.
ESCAPING = frozenset({"lines", "lines_crlf", "array", "array_indented", "splits", "entries", "values"})


# ---- compressions and archives ----


def _zipped(data: bytes, name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(f"data/{name}"), data)
        archive.writestr(zipfile.ZipInfo("README"), b"About the data.")
    return out.getvalue()


def _tarred(data: bytes, name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member, content in (("README", b"About the data."), (f"data/{name}", data)):
            header = tarfile.TarInfo(member)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return out.getvalue()


def _gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


#: What is put behind a file's name, and its bytes packed.
PACKED: dict[str, tuple[str, Callable[[bytes, str], bytes]]] = {
    "plain": ("", lambda data, name: data),
    "gz": (".gz", lambda data, name: _gzipped(data)),
    "bz2": (".bz2", lambda data, name: bz2.compress(data)),
    "xz": (".xz", lambda data, name: lzma.compress(data)),
    "zst": (".zst", lambda data, name: pa.compress(data, codec="zstd", asbytes=True)),
    "zip": (".zip", _zipped),
    "tar": (".tar", _tarred),
    "tar.gz": (".tar.gz", lambda data, name: _gzipped(_tarred(data, name))),
    "gz in zip": (".zip", lambda data, name: _zipped(_gzipped(data), f"{name}.gz")),
}


def packed(data: bytes, name: str, how: str) -> tuple[str, bytes]:
    """The file's name and bytes, packed as a key of PACKED says."""
    ending, pack = PACKED[how]
    return name + ending, pack(data, name)
