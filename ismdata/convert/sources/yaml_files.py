"""YAML files of conversations: a list, or a mapping whose `conversations` are one, as chatterbot's corpus has them.

Scalars stay the text that they are: no yes becomes true, no 007 a number. Anchors are refused, since a few lines of
them can stand for more data than any memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ismdata.convert.sources.blocks import ValueBlock
from ismdata.convert.sources.framing import ByteQueue, Framed
from ismdata.errors import DataError

#: A YAML file is read as a whole, and its values take some thirty times its size.
MAX_YAML_BYTES = 64 << 20
_MAX_DEPTH = 100
_FIELD = "conversations"
_LOOKED_AT = 20


def frame_yaml(queue: ByteQueue, *, is_record: Callable[[Any], bool]) -> Iterator[Framed]:
    """The items of the list, numbered from 1; a mapping that is a record itself is one. Raises DataError."""
    while queue.more():
        if len(queue.data) > MAX_YAML_BYTES:
            raise DataError(
                f"{queue.name}: more than {MAX_YAML_BYTES:,} bytes of YAML; expected less. Split the file, or save it "
                "as JSON Lines"
            )
    records = [record for document in documents(queue.data, queue.name) for record in _records(document, is_record)]
    queue.drop(len(queue.data))
    if records:
        yield Framed(block=ValueBlock(values=records, numbers=np.arange(1, len(records) + 1)))


def _records(document: Any, is_record: Callable[[Any], bool]) -> list[Any]:
    if isinstance(document, str):
        return [document] if document else []
    if isinstance(document, list):
        return document
    held = document.get(_FIELD)
    if not isinstance(held, list):
        return [document]
    whole = is_record(document) and not any(map(is_record, held[:_LOOKED_AT]))
    return [document] if whole else held


def documents(data: bytes, name: str) -> list[Any]:
    """The documents of a YAML file as dicts, lists and strings. Raises DataError for anything but those."""
    import yaml  # type: ignore[import-untyped]  # late: only who brings YAML needs it

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    found: list[Any] = []
    open_: list[_Node] = []  # the collections around the place that is read
    try:
        for event in yaml.parse(data, Loader=loader):
            place = f"{name}:{event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise DataError(f"{place}: found an anchor or an alias; expected plain values. Write the value out")
            if isinstance(event, yaml.CollectionEndEvent):
                value = open_.pop().value
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(open_) == _MAX_DEPTH:
                    raise DataError(f"{place}: nested more than {_MAX_DEPTH} levels deep; expected conversations")
                open_.append(_Node({} if isinstance(event, yaml.MappingStartEvent) else []))
                continue
            elif isinstance(event, yaml.ScalarEvent):
                value = event.value
            else:
                continue
            if open_:
                open_[-1].add(value, place)
            else:
                found.append(value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = name if mark is None else f"{name}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise DataError(f"{place}: {problem}; expected valid YAML in UTF-8. Repair the file") from error
    return found


class _Node:
    """A list or mapping that is being filled."""

    def __init__(self, value: dict[str, Any] | list[Any]) -> None:
        self.value = value
        self._key: str | None = None

    def add(self, value: Any, place: str) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        elif self._key is None:
            if not isinstance(value, str) or value in self.value:
                found = f"the key {value!r} a second time" if isinstance(value, str) else "a key that is no text"
                raise DataError(f"{place}: found {found}; expected each key once. Repair the file")
            self._key = value
        else:
            self.value[self._key], self._key = value, None
