"""Detects a file's layout from its first bytes. Its name only helps to tell tables, YAML and plain text apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ismdata.convert.corpus_format import ID_FIELDS
from ismdata.convert.json_values import parse_record_json
from ismdata.convert.sources.blocks import with_key
from ismdata.convert.sources.chat_logs import is_chat_log
from ismdata.convert.sources.delimited import DELIMITERS, detect_delimiter, frame_rows
from ismdata.convert.sources.file_names import is_table, is_yaml
from ismdata.convert.sources.foreign import refuse_foreign
from ismdata.convert.sources.framing import (
    BLOCK_BYTES,
    WHITESPACE,
    ByteQueue,
    Framed,
    frame_document,
    frame_entries,
    frame_lines,
    frame_splits,
    frame_values,
    frame_whole,
)
from ismdata.convert.sources.pandas_json import LAYOUT, detect_pandas
from ismdata.convert.sources.yaml_files import frame_yaml

#: Fields of records that hold lists: an object that begins with one of them is a record, not an object of splits.
_RECORD_FIELDS = frozenset(
    {"messages", "conversations", "conversation", "history", "dialog", "dialogue", "tools", *ID_FIELDS}
)

JSON_LINES, TEXT_LINES, CHAT_LOG = "JSON Lines", "text lines", "a chat log"
#: The layout of `{"train": […], "valid": […]}`.
SPLITS = "an object of splits"
#: Layouts whose records are numbered by the lines on which they begin; in all others they are counted.
LINE_LAYOUTS = frozenset({JSON_LINES, TEXT_LINES, *DELIMITERS.values()})

Framing = Callable[[ByteQueue], Iterator[Framed]]

_UTF8_MARK = b"\xef\xbb\xbf"
#: How JSON lists and objects begin; text that begins with a bracket continues differently.
_JSON_OPENING = re.compile(rb'\s*(\[\s*(["\[{\]]|-?\d[\d.eE+-]*\s*([,\]]|$)|true|false|null|$)|\{\s*(["}]|$))')
_KEY = re.compile(r'\s*"((?:[^"\\\n]|\\.)*)"\s*:\s*')
#: YAML that is recognized without a file name: chatterbot's fields, or a list of lists. Each line before it can match
#: in only one way; otherwise many blank lines would take exponential time.
_YAML_OPENING = re.compile(rb"\A(?:[^\S\n]*(?:#.*)?\n|---[^\S\n]*\n)*(categories:|conversations:|- - .*\n(  - |- - ))")
#: Lines, or entries of an object, examined before a decision.
_MOST_EXAMINED = 20
#: Bytes of a text in which a chat log shows.
_LOG_HEAD = 1 << 12
#: Limit of bytes read ahead to get the first complete entry of an object.
_MOST_BYTES_AHEAD = 64 << 20


def skip_byte_order_mark(queue: ByteQueue) -> None:
    """Drop a UTF-8 byte order mark. Raises DataError for files that are no text, or text of no corpus."""
    if not queue.data:
        queue.more()
    refuse_foreign(queue.data, queue.name)
    if queue.data.startswith(_UTF8_MARK):
        queue.drop(len(_UTF8_MARK))
    if b"\r" in queue.data and b"\n" not in queue.data:
        queue.end_lines_at_returns()


def detect_layout(queue: ByteQueue, is_record: Callable[[Any], bool]) -> tuple[str, Framing]:
    """The layout of a file, and the function that cuts the file into records.

    Args:
        queue: The file from its first byte.
        is_record: Whether a value is a record of some format. It is called with the first element of a list, the first
            entries of an object, the first row of a table and the first line of text.

    Returns:
        The layout in words, and its framing function.
    """
    if is_chat_log(queue.data[:_LOG_HEAD]) and is_record(queue.data[:_LOG_HEAD].decode("utf-8", errors="replace")):
        return CHAT_LOG, frame_whole
    entries, complete = _first_entries(queue)
    whole = bool(entries) and complete and is_record(dict(entries))
    opens_entries = not whole and _opens_entries(entries, is_record)
    head = queue.data
    opening = head.lstrip(WHITESPACE)[:1] if _JSON_OPENING.match(head) else b""
    lines = [line for line in head.split(b"\n", _MOST_EXAMINED)[:_MOST_EXAMINED] if line.strip(WHITESPACE)]
    values = [value for value in map(_value, lines) if isinstance(value, dict | list)]
    if opening == b"[" and _first_inside(head) not in (b'"', b""):
        many_lists = len(values) > 1 and all(isinstance(value, list) for value in values)
        if not many_lists and not _is_conversation(head, is_record):
            return "a JSON array", frame_document
    if opening == b"[" and not values and _first_inside(head) == b"":
        return "a JSON array", frame_document
    alone = whole or (len(values) == 1 and is_record(values[0]))
    pandas = detect_pandas(queue, is_record) if opening == b"{" and len(values) < 2 and not alone else None
    if pandas is not None:
        return LAYOUT, pandas
    if opening == b"{" and len(values) < 2 and not alone and _opens_splits(head, is_record):
        return SPLITS, frame_splits
    if opens_entries and len(values) < 2:
        return "an object of records", frame_entries
    if not opening:
        other = _yaml_or_table(queue, is_record)
        if other is not None:
            return other
    # A line of text may look like JSON. If the first line is a record of text, all lines are.
    is_text = not opening and bool(lines) and is_record(lines[0].decode("utf-8", errors="replace").strip())
    if not is_text and (values or any(line[:1] == b"{" and line.rstrip(WHITESPACE)[-1:] == b"}" for line in lines)):
        return JSON_LINES, partial(frame_lines, plain_text=False)
    if opening in (b"{", b"["):
        return "JSON values", frame_values
    return TEXT_LINES, partial(frame_lines, plain_text=True)


def _yaml_or_table(queue: ByteQueue, is_record: Callable[[Any], bool]) -> tuple[str, Framing] | None:
    """The layout of YAML or a table; None for lines of text, and for JSON Lines with a broken first line."""
    if is_yaml(queue.name) or _YAML_OPENING.match(queue.data):
        return "YAML", partial(frame_yaml, is_record=is_record)
    first = queue.data.lstrip(WHITESPACE).split(b"\n", 1)[0].decode("utf-8", errors="replace").strip()
    # Pairs separated by a tab need no header: if a line is a record, the file's name alone does not make it a table.
    named = is_table(queue.name) and not is_record(first)
    # A row may be longer than what was read ahead: read on to the end of the first row below the header.
    while named and queue.data.count(b"\n") < 2 and len(queue.data) < _MOST_BYTES_AHEAD and queue.more():
        pass
    delimiter = detect_delimiter(queue.data, is_record, named=named)
    return None if delimiter is None else (DELIMITERS[delimiter], partial(frame_rows, delimiter=delimiter))


def _value(line: bytes) -> object:
    try:
        return parse_record_json(line.decode("utf-8"))
    except ValueError:
        return None


def _first_inside(head: bytes) -> bytes:
    """The first byte of an array's first element."""
    return head.lstrip(WHITESPACE)[1:].lstrip(WHITESPACE)[:1]


def _opens_splits(head: bytes, is_record: Callable[[Any], bool]) -> bool:
    """Whether the first value of an object is a list whose first element is a record rather than a message."""
    found = re.match(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*(?=[\[{])', head)
    if found is None or found.group(1).decode("utf-8", errors="replace") in _RECORD_FIELDS:
        return False
    element = _first_value(head[found.end() :])
    return element is None or is_record(element)


def _opens_entries(entries: Sequence[tuple[str, Any]], is_record: Callable[[Any], bool]) -> bool:
    """Whether an object that begins with these entries is an object of records by id."""
    if not entries:
        return False
    # Keys such as `chosen` and `rejected` are fields, whatever their values. Ids have digits, or there are many.
    numbered = any(char.isdigit() for char in entries[0][0])
    known = [key for key, value in entries if isinstance(value, dict | list) and is_record(with_key(key, value))]
    if known:
        lists = any(isinstance(value, list) for _, value in entries)
        return numbered or (len(known) > 2 and not lists)
    fields = [value.keys() if isinstance(value, dict) else None for _, value in entries]
    return numbered and len(entries) > 1 and bool(fields[0]) and all(each == fields[0] for each in fields)


def _first_entries(queue: ByteQueue) -> tuple[list[tuple[str, Any]], bool]:
    """The first entries of the object with which a file begins, and whether these are all.

    They end before an incomplete entry, and after 20 entries. Reads ahead until the first entry is complete.
    """
    opening = re.match(rb'\s*\{\s*"((?:[^"\\\n]|\\.)*)"\s*:\s*[\[{]', queue.data)
    if opening is not None and opening.group(1).decode("utf-8", errors="replace") in _RECORD_FIELDS:
        return [], False  # a record, as in most files
    while opening is not None:
        text = queue.data.decode("utf-8", errors="ignore")
        entries: list[tuple[str, Any]] = []
        at = text.index("{") + 1
        while len(entries) < _MOST_EXAMINED and (key := _KEY.match(text, at)) is not None:
            try:
                value, at = json.JSONDecoder().raw_decode(text, key.end())
            except (ValueError, RecursionError):
                break
            entries.append((key.group(1), value))
            rest = text[at : at + 80].lstrip()
            if rest[:1] != ",":
                return entries, rest[:1] == "}"
            at = text.index(",", at) + 1
        if entries or len(queue.data) > _MOST_BYTES_AHEAD or not queue.more(max(BLOCK_BYTES, len(queue.data))):
            return entries, False
    return [], False


def _is_conversation(head: bytes, is_record: Callable[[Any], bool]) -> bool:
    """Whether a list is one record with messages as its elements, rather than a list of records."""
    element = _first_value(head.lstrip(WHITESPACE)[1:].lstrip(WHITESPACE))
    return element is not None and not is_record(element) and is_record([element])


def _first_value(text: bytes) -> Any:
    """The JSON value at the beginning of a text, None if it is incomplete."""
    try:
        return json.JSONDecoder().raw_decode(text.decode("utf-8", errors="ignore"))[0]
    except (ValueError, RecursionError):
        return None
