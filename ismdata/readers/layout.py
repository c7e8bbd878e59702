"""Which framing a file needs, read off its first bytes and never off its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ismdata.errors import DataError
from ismdata.readers.base import ID_FIELDS
from ismdata.readers.canonical import parse_json
from ismdata.readers.framing import (
    BLANK,
    ByteQueue,
    Framed,
    frame_document,
    frame_lines,
    frame_splits,
    frame_values,
)

#: Fields of single records that hold lists: an object that opens with one of them is a record, not one of splits.
_RECORD_FIELDS = frozenset(
    {"messages", "conversations", "conversation", "history", "dialog", "dialogue", "tools", *ID_FIELDS}
)

JSON_LINES, TEXT_LINES = "JSON Lines", "text lines"

Framing = Callable[[ByteQueue], Iterator[Framed]]

_UTF8_MARK = b"\xef\xbb\xbf"
#: First bytes of what is no text, and what to do about it.
_FOREIGN = {
    b"\xff\xfe": ("UTF-16", "convert the file to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert the file to UTF-8"),
    b"\x28\xb5\x2f\xfd": ("Zstandard data", "unpack it first"),
    b"BZh": ("bzip2 data", "unpack it first"),
    b"\xfd7zXZ": ("xz data", "unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"ARROW1": ("an Arrow file", "save it as Parquet, or name the folder that `save_to_disk` wrote"),
}
#: How JSON lists and objects open; text that opens with a bracket goes on differently.
_JSON_OPENING = re.compile(rb'\s*(\[\s*(["\[{\]-]|\d|true|false|null|$)|\{\s*(["}]|$))')
#: Lines looked at before a decision.
_LOOKED_AT = 20


def skip_mark(queue: ByteQueue) -> None:
    """Drop a UTF-8 byte order mark; raise DataError for files that are no UTF-8 text or hold nothing."""
    if not queue.data:
        queue.more()
    for mark, (what, todo) in _FOREIGN.items():
        if queue.data.startswith(mark):
            raise DataError(f"{queue.name}: found {what}; expected UTF-8 text, gzip, zip or Parquet: {todo}")
    if queue.data.startswith(_UTF8_MARK):
        queue.drop(len(_UTF8_MARK))


def framing_of(queue: ByteQueue, is_record: Callable[[Any], bool]) -> tuple[str, Framing]:
    """What the file is made of, in words, and the function that cuts it into records.

    `is_record` tells a record of some format from other values; it is asked about the first element of a first list.
    """
    head = queue.data
    opening = head.lstrip(BLANK)[:1] if _JSON_OPENING.match(head) else b""
    lines = [line for line in head.split(b"\n", _LOOKED_AT)[:_LOOKED_AT] if line.strip(BLANK)]
    values = [value for value in map(_value, lines) if isinstance(value, dict | list)]
    if opening == b"[" and _first_inside(head) not in (b'"', b""):
        many_lists = len(values) > 1 and all(isinstance(value, list) for value in values)
        if not many_lists and not _is_conversation(head, is_record):
            return "a JSON array", frame_document
    if opening == b"[" and not values and _first_inside(head) == b"":
        return "a JSON array", frame_document
    if opening == b"{" and len(values) < 2 and _opens_splits(head, is_record):
        return "an object of splits", frame_splits
    if values or any(line[:1] == b"{" and line.rstrip(BLANK)[-1:] == b"}" for line in lines):
        return JSON_LINES, partial(frame_lines, plain_text=False)
    if opening in (b"{", b"["):
        return "JSON values", frame_values
    return TEXT_LINES, partial(frame_lines, plain_text=True)


def _value(line: bytes) -> object:
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError:
        return None


def _first_inside(head: bytes) -> bytes:
    """The first byte of an array's first element."""
    return head.lstrip(BLANK)[1:].lstrip(BLANK)[:1]


def _opens_splits(head: bytes, is_record: Callable[[Any], bool]) -> bool:
    """Whether an object's first value is a list of lists or of objects that are records rather than messages."""
    found = re.match(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*(?=[\[{])', head)
    if found is None or found.group(1).decode("utf-8", errors="replace") in _RECORD_FIELDS:
        return False
    element = _first_value(head[found.end() :])
    return element is None or is_record(element)


def _is_conversation(head: bytes, is_record: Callable[[Any], bool]) -> bool:
    """Whether a list is one record, its elements being messages, rather than a list of records."""
    element = _first_value(head.lstrip(BLANK)[1:].lstrip(BLANK))
    return element is not None and not is_record(element) and is_record([element])


def _first_value(text: bytes) -> Any:
    """The JSON value that opens a text, None when it is not complete."""
    try:
        return json.JSONDecoder().raw_decode(text.decode("utf-8", errors="ignore"))[0]
    except (ValueError, RecursionError):
        return None
