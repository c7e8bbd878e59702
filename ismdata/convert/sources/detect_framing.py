"""Which framing a file needs, read off its first bytes; its name counts only between tables, YAML and plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ismdata.convert.canonical import parse_json
from ismdata.convert.corpus_format import ID_FIELDS
from ismdata.convert.sources.blocks import with_key
from ismdata.convert.sources.delimited import DELIMITERS, delimiter_of, frame_rows
from ismdata.convert.sources.framing import (
    BLANK,
    BLOCK_BYTES,
    ByteQueue,
    Framed,
    frame_document,
    frame_entries,
    frame_lines,
    frame_splits,
    frame_values,
)
from ismdata.convert.sources.yaml_files import frame_yaml
from ismdata.errors import DataError

#: Fields of single records that hold lists: an object that opens with one of them is a record, not one of splits.
_RECORD_FIELDS = frozenset(
    {"messages", "conversations", "conversation", "history", "dialog", "dialogue", "tools", *ID_FIELDS}
)

JSON_LINES, TEXT_LINES = "JSON Lines", "text lines"
#: Layouts whose records are numbered by the lines they begin on; in all others they are counted.
LINE_LAYOUTS = frozenset({JSON_LINES, TEXT_LINES, *DELIMITERS.values()})

Framing = Callable[[ByteQueue], Iterator[Framed]]

_UTF8_MARK = b"\xef\xbb\xbf"
#: First bytes of what is no text, and what to do about it.
_FOREIGN = {
    b"\xff\xfe\x00\x00": ("UTF-32", "convert the file to UTF-8"),
    b"\x00\x00\xfe\xff": ("UTF-32", "convert the file to UTF-8"),
    b"\xff\xfe": ("UTF-16", "convert the file to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert the file to UTF-8"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"Rar!\x1a": ("a RAR archive", "unpack it first"),
    b"\x04\x22\x4d\x18": ("LZ4 data", "unpack it first"),
    b"ARROW1": ("an Arrow file", "save it as Parquet, or name the folder that `save_to_disk` wrote"),
}
#: JSON in UTF-16 or UTF-32 without a mark: a bracket among zero bytes.
_WIDE_JSON = re.compile(rb"\x00{1,3}[\[{]|[\[{]\x00{1,3}")
#: How JSON lists and objects open; text that opens with a bracket goes on differently.
_JSON_OPENING = re.compile(rb'\s*(\[\s*(["\[{\]-]|\d|true|false|null|$)|\{\s*(["}]|$))')
_KEY = re.compile(r'\s*"((?:[^"\\\n]|\\.)*)"\s*:\s*')
#: YAML that shows without a name: chatterbot's fields, or a list of lists.
#: Each line before it can be matched in one way only: blank ones would else take time without end.
_YAML_OPENING = re.compile(rb"\A(?:[^\S\n]*(?:#.*)?\n|---[^\S\n]*\n)*(categories:|conversations:|- - .*\n(  - |- - ))")
_YAML_NAME = re.compile(r"(?i)\.ya?ml(\.(gz|zst|bz2|xz))?$")
_TABLE_NAME = re.compile(r"(?i)\.[ct]sv(\.(gz|zst|bz2|xz))?$")
#: Lines, and entries of an object, looked at before a decision.
_LOOKED_AT = 20
#: How far is read ahead to see the first entry of an object as a whole.
_LOOKED_AHEAD = 64 << 20


def skip_mark(queue: ByteQueue) -> None:
    """Drop a UTF-8 byte order mark; raise DataError for files that are no UTF-8 text or hold nothing."""
    if not queue.data:
        queue.more()
    for mark, (what, todo) in _FOREIGN.items():
        if queue.data.startswith(mark):
            raise DataError(f"{queue.name}: found {what}; expected UTF-8 text or Parquet, packed or not: {todo}")
    if _WIDE_JSON.match(queue.data):
        raise DataError(f"{queue.name}: found UTF-16 or UTF-32; expected UTF-8 text: convert the file to UTF-8")
    if queue.data.startswith(_UTF8_MARK):
        queue.drop(len(_UTF8_MARK))


def framing_of(queue: ByteQueue, is_record: Callable[[Any], bool]) -> tuple[str, Framing]:
    """What the file is made of, in words, and the function that cuts it into records.

    `is_record` tells a record of some format from other values. It is asked about the first element of a first list,
    the first entries of an object, the first row of a table, the first line of text.
    """
    opens_entries = _opens_entries(queue, is_record)
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
    alone = len(values) == 1 and is_record(values[0])
    if opening == b"{" and len(values) < 2 and not alone and _opens_splits(head, is_record):
        return "an object of splits", frame_splits
    if opens_entries and len(values) < 2:
        return "an object of records", frame_entries
    if not opening:
        other = _no_json(queue, is_record)
        if other is not None:
            return other
    # A line of text may look like JSON; where the first one is a record of text, so are the others.
    is_text = not opening and bool(lines) and is_record(lines[0].decode("utf-8", errors="replace").strip())
    if not is_text and (values or any(line[:1] == b"{" and line.rstrip(BLANK)[-1:] == b"}" for line in lines)):
        return JSON_LINES, partial(frame_lines, plain_text=False)
    if opening in (b"{", b"["):
        return "JSON values", frame_values
    return TEXT_LINES, partial(frame_lines, plain_text=True)


def _no_json(queue: ByteQueue, is_record: Callable[[Any], bool]) -> tuple[str, Framing] | None:
    """YAML or a table; None for lines of text, and of JSON of which the first is broken."""
    if _YAML_NAME.search(queue.name) or _YAML_OPENING.match(queue.data):
        return "YAML", partial(frame_yaml, is_record=is_record)
    first = queue.data.lstrip(BLANK).split(b"\n", 1)[0].decode("utf-8", errors="replace").strip()
    # Pairs parted by a tab need no header: lines that are records by themselves are no table for their name alone.
    named = _TABLE_NAME.search(queue.name) is not None and not is_record(first)
    delimiter = delimiter_of(queue.data, is_record, named=named)
    return None if delimiter is None else (DELIMITERS[delimiter], partial(frame_rows, delimiter=delimiter))


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


def _opens_entries(queue: ByteQueue, is_record: Callable[[Any], bool]) -> bool:
    """Whether a file is an object of records by id, rather than one record or an object of something else.

    Reads ahead until the first entry is there as a whole.
    """
    entries, whole = _first_entries(queue)
    if not entries or (whole and is_record(dict(entries))):
        return False
    # Names such as `chosen` and `rejected` are fields, whatever they hold; ids have digits, or there are many.
    numbered = any(char.isdigit() for char in entries[0][0])
    known = [key for key, value in entries if isinstance(value, dict | list) and is_record(with_key(key, value))]
    if known:
        lists = any(isinstance(value, list) for _, value in entries)
        return numbered or (len(known) > 2 and not lists)
    fields = [value.keys() if isinstance(value, dict) else None for _, value in entries]
    return numbered and len(entries) > 1 and bool(fields[0]) and all(each == fields[0] for each in fields)


def _first_entries(queue: ByteQueue) -> tuple[list[tuple[str, Any]], bool]:
    """The first entries of the object that a file opens with, as far as they are lists or objects; and whether all."""
    opening = re.match(rb'\s*\{\s*"((?:[^"\\\n]|\\.)*)"\s*:\s*[\[{]', queue.data)
    if opening is not None and opening.group(1).decode("utf-8", errors="replace") in _RECORD_FIELDS:
        return [], False  # a record, and most files open with one
    while opening is not None:
        text = queue.data.decode("utf-8", errors="ignore")
        entries: list[tuple[str, Any]] = []
        at = text.index("{") + 1
        while len(entries) < _LOOKED_AT and (key := _KEY.match(text, at)) is not None:
            try:
                value, at = json.JSONDecoder().raw_decode(text, key.end())
            except (ValueError, RecursionError):
                break
            entries.append((key.group(1), value))
            rest = text[at : at + 80].lstrip()
            if rest[:1] != ",":
                return entries, rest[:1] == "}"
            at = text.index(",", at) + 1
        if entries or len(queue.data) > _LOOKED_AHEAD or not queue.more(max(BLOCK_BYTES, len(queue.data))):
            return entries, False
    return [], False


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
