"""Write one conversation to a file as a JSON line of `messages`, and read it, under the rules of `ismdata convert`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ismdata.convert import OPENAI, Rules, canonicalize, parse_json, role_table
from ismdata.errors import DataError, Refused
from ismdata.rendering import Message, as_template_messages


def write_conversation(path: Path, messages: Sequence[Message], tools: list[Any] | None) -> None:
    """Write one conversation to a file, completely or not at all.

    Raises:
        DataError: If the file cannot be written, or `ismdata convert` would refuse the conversation.
    """
    record: dict[str, Any] = {"messages": list(messages)}
    if tools:
        record["tools"] = tools
    try:
        canonical_conversation(record)
    except Refused as refusal:
        raise DataError(f"{path}: not written, because convert would refuse it: {refusal.detail}") from refusal
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}). Name another file") from error


def read_conversation(path: Path) -> tuple[list[Message], list[Any] | None]:
    """Read the messages, in the form that templates take, and the tools of the one conversation in a file.

    Raises:
        DataError: If the file is not one JSON line of messages; it names the line, what was found and expected.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; expected one JSON line of messages") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a file with one JSON line of messages") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) != 1:
        raise DataError(f"{path}: {len(lines)} non-empty lines; expected one, the conversation that /save writes")
    number, line = lines[0]
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}:{number}: not JSON ({error}); expected {{"messages": [...]}}') from error
    try:
        return as_template_messages(canonical_conversation(record))
    except Refused as refusal:
        # convert's advice names an option that a session does not have.
        raise DataError(f"{path}:{number}: {refusal.detail.partition('. Map it with')[0]}") from refusal


def canonical_conversation(record: Any) -> dict[str, Any]:
    """Make a record of messages a canonical conversation, under the rules of `ismdata convert`.

    Raises:
        Refused: If it is no such record, or breaks a rule.
    """
    if not OPENAI.matches(record):
        raise Refused("missing_field", 'no messages found; expected {"messages": [{"role": …, "content": …}]}')
    return canonicalize(OPENAI.parse_record(record)[0], Rules(roles=role_table({})))
