"""What several formats need to take a record apart: required fields, text fields, lists stored as columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ismdata.convert.corpus_format import MORE_SYSTEMS, kind_of
from ismdata.errors import Refused, shown

#: Message fields with what belongs to the text and is no text.
FILES = frozenset(
    {
        *("attachments", "attachment", "experimental_attachments", "files", "files_v2", "file_ids"),
        *("images", "image", "image_url", "videos", "video", "audios", "audio"),
    }
)

#: Message fields with the messages below it in a tree.
BRANCHES = frozenset({"children", "replies"})


def refuse_files(message: Mapping[str, Any], number: int) -> None:
    """Raise Refused for message `number` if files belong to it, or messages below it: the list is only half of it."""
    for name in FILES & message.keys():
        if message[name] and isinstance(message[name], list | dict | str):
            raise Refused("unsupported_content", f"message {number} has {name}; expected text only")
    for name in BRANCHES & message.keys():
        if isinstance(message[name], list) and any(isinstance(one, dict) for one in message[name]):
            raise Refused(
                "unsupported_content",
                f"message {number} has further messages in {name}; expected a list without trees. Write each path of "
                "the tree as a list of its own",
            )


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


#: Fields whose text is the system prompt of a record.
SYSTEMS = ("system", "system_prompt")
#: How a `persona` begins that tells the assistant who it is, rather than who the user is.
_ADDRESSED = re.compile(
    r"\s*(you\b|act as\b|be |play |pretend\b|your (name|role|task)\b|as an? (ai|assistant)\b)", re.IGNORECASE
)
#: Fields beside which an `instruction` is the question of an exchange.
_ANSWERS = ("output", "response", "answer", "completion", "input", "target")


def take_instruction(fields: dict[str, Any], texts: Collection[Any]) -> list[str]:
    """Remove the `instruction` of a whole conversation, whose messages have these texts, and return it in a list."""
    found = fields.get("instruction")
    if not isinstance(found, str) or not found.strip() or any(fields.get(name) for name in _ANSWERS):
        return []
    if any(isinstance(text, str) and found.strip() in text for text in texts):
        return []  # a copy of the question
    return [fields.pop("instruction")]


def take_more_systems(fields: dict[str, Any], known: Collection[str] = ()) -> list[str]:
    """Remove system prompts under less usual names from a record's fields, and return those that are not `known`."""
    found = [name for name in MORE_SYSTEMS if isinstance(fields.get(name), str)]
    persona = fields.get("persona")
    if not known and not found and isinstance(persona, str) and _ADDRESSED.match(persona):
        found.append("persona")
    texts = dict.fromkeys(fields.pop(name) for name in found)
    return [text for text in texts if text.strip() and text not in known]


def take_system_prompts(fields: dict[str, Any], known: Collection[str] = ()) -> list[str]:
    """Remove and return system prompts of a transcript that are not `known`. Its `system` may name a speaker."""
    names = [name for name in ("system_prompt", *MORE_SYSTEMS) if name.lower() not in ("system", "sys")]
    texts = dict.fromkeys(fields.pop(name) for name in names if isinstance(fields.get(name), str))
    return [text for text in texts if text.strip() and text not in known]


#: Fields whose text is what an answer was thought out with.
_THOUGHTS = frozenset(
    {"reasoning_content", "reasoning", "thinking", "thinking_content", "cot", "chain_of_thought", "complex_cot"}
)
#: Values of such fields that are settings.
_SETTINGS = frozenset(
    {
        "",
        "on",
        "off",
        "yes",
        "no",
        "true",
        "false",
        "none",
        "null",
        "auto",
        "low",
        "medium",
        "high",
        "minimal",
        "0",
        "1",
    }
)


def take_thoughts(fields: dict[str, Any]) -> str | None:
    """Remove the reasoning of a record's only answer from its fields and return it, None if there is none."""
    for name, value in fields.items():
        if name.lower() in _THOUGHTS and isinstance(value, str) and value.strip().lower() not in _SETTINGS:
            return str(fields.pop(name))
    return None


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


def is_texts(value: Any) -> bool:
    """Whether a value is a list of strings, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def only_answer(value: Any, name: str) -> Any:
    """The answer in a list of one text; any other value unchanged. Raises Refused for several answers."""
    if not is_texts(value):
        return value
    if len(value) > 1:
        raise Refused(
            "invalid_field",
            f"{name} is a list of {len(value)} texts, several answers to one question; expected one. Choose one, "
            "or write a record for each",
        )
    return value[0]
