"""What several formats need to take a record apart: required fields, text fields, lists stored as columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ismdata.convert.corpus_format import kind_of
from ismdata.errors import Refused, shown


def missing_field(fields: Iterable[object], expected: str) -> Refused:
    """The refusal of a record without a required field. `fields` are the names of the fields that it has."""
    return Refused("missing_field", f"the record has the fields {listed_names(fields)}; expected {expected}")


def listed_names(fields: Iterable[object]) -> str:
    """Field names for an error message.

    >>> listed_names({"id": 1, "text": ""}), listed_names({})
    ('id, text', '(none)')
    """
    return ", ".join(map(str, fields)) or "(none)"


def take_text(fields: dict[str, Any], name: str) -> str | None:
    """Remove a field from a record and return its string; None if it is absent or null. Raises Refused otherwise."""
    text = fields.pop(name, None)
    if text is not None and not isinstance(text, str):
        raise Refused("invalid_field", f"{name} is {kind_of(text)}; expected a string")
    return text


def is_columns(value: Any) -> bool:
    """Whether a value is a list of objects stored as an object of lists, as some Parquet files have it."""
    return isinstance(value, dict) and bool(value) and all(isinstance(column, list) for column in value.values())


def rows_of_columns(columns: Mapping[str, list[Any]], name: str) -> list[dict[str, Any]]:
    """The list of objects that an object of lists holds; `name` is its field. Raises Refused if lengths differ.

    >>> rows_of_columns({"role": ["user"], "content": ["Hi"]}, "messages")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if len({len(column) for column in columns.values()}) > 1:
        raise Refused("invalid_field", f"the lists in {name} differ in length; expected one entry per message in each")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def path_to(nodes: Mapping[str, Any], current: Any, parent: str) -> list[dict[str, Any]]:
    """The messages of a tree from the first one to the current one.

    Args:
        nodes: The messages by id.
        current: The id of the last message, None for none.
        parent: The field with the id of the message before.

    Returns:
        The messages in order.

    Raises:
        Refused: If a message is missing or its own ancestor.
    """
    path: list[dict[str, Any]] = []
    seen: set[str] = set()
    while current is not None:
        node = nodes.get(current) if isinstance(current, str) else None
        if not isinstance(node, dict):
            raise Refused("broken_tree", f"the message {shown(current)} is missing; expected the complete chat")
        if current in seen:
            raise Refused("broken_tree", f"the message {shown(current)} is its own ancestor; expected a tree")
        seen.add(current)
        path.append(node)
        current = node.get(parent)
    return path[::-1]
