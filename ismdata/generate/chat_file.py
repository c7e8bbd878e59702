"""One conversation as a line of `messages`, to a file and back: what `ismdata convert` reads, by its own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ismdata.convert import OPENAI, Rules, canonicalize, parse_json, role_table
from ismdata.errors import DataError, Refused
from ismdata.rendering import Message, as_template_messages


def write_line(path: Path, messages: Sequence[Message], tools: list[Any] | None) -> None:
    """Write one conversation to `path`, whole or not at all. Raises DataError where `convert` would refuse it."""
    record: dict[str, Any] = {"messages": list(messages)}
    if tools:
        record["tools"] = tools
    try:
        check_record(record)
    except Refused as refusal:
        raise DataError(f"{path}: not written, since convert would refuse it: {refusal.detail}") from refusal
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: writing failed ({error.strerror or error}). Name another file") from error


def read_line(path: Path) -> tuple[list[Message], list[Any] | None]:
    """The messages, as templates take them, and the tools of the one conversation in `path`.

    Raises DataError with the line, what was found and what is expected.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; expected one JSON line of messages") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a file with one JSON line of messages") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) != 1:
        raise DataError(
            f"{path}: {len(lines)} lines that hold something; expected one, a conversation as /save writes it"
        )
    number, line = lines[0]
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}:{number}: not JSON ({error}); expected {{"messages": [...]}}') from error
    try:
        return as_template_messages(check_record(record))
    except Refused as refusal:
        # What convert maps with an option has to be changed in the file here.
        raise DataError(f"{path}:{number}: {refusal.detail.partition('. Map it with')[0]}") from refusal


def check_record(record: Any) -> dict[str, Any]:
    """A record of messages as a canonical conversation, by the rules of `convert`. Raises Refused."""
    if not OPENAI.matches(record):
        raise Refused("missing_field", 'no messages found; expected {"messages": [{"role": …, "content": …}]}')
    return canonicalize(OPENAI.parse_record(record)[0], Rules(roles=role_table({})))
