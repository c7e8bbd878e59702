"""YAML files of conversations: a list, or a mapping with a list as its `conversations`, as in chatterbot's corpus.

Scalars stay text: `yes` does not become true, nor 007 a number. Anchors are refused, because a few lines of them can
expand to more data than fits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ismdata.convert.sources.blocks import ValueBlock
from ismdata.convert.sources.framing import ByteQueue, Framed
from ismdata.errors import DataError

#: Limit of a YAML file, which is read at once; its values take about thirty times its size in memory.
MAX_YAML_BYTES = 64 << 20
_MAX_DEPTH = 100
_FIELD = "conversations"
_MOST_EXAMINED = 20


def frame_yaml(queue: ByteQueue, *, is_record: Callable[[Any], bool]) -> Iterator[Framed]:
    """The items of the list, or the mapping if it is itself a record, numbered from 1. Raises DataError."""
    while queue.more():
        if len(queue.data) > MAX_YAML_BYTES:
            raise DataError(
                f"{queue.name}: found more than {MAX_YAML_BYTES:,} bytes of YAML; expected less. Split the file, or "
                "save it as JSON Lines"
            )
    records = [
        record for document in parse_documents(queue.data, queue.name) for record in _records(document, is_record)
    ]
    queue.drop(len(queue.data))
    if records:
        yield Framed(block=ValueBlock(values=records, numbers=np.arange(1, len(records) + 1)))


def _records(document: Any, is_record: Callable[[Any], bool]) -> list[Any]:
    if isinstance(document, str):
        return [document] if document else []
    if isinstance(document, list):
        return document
    listed = document.get(_FIELD)
    if not isinstance(listed, list):
        return [document]
    whole = is_record(document) and not any(map(is_record, listed[:_MOST_EXAMINED]))
    return [document] if whole else listed


def parse_documents(data: bytes, name: str) -> list[Any]:
    """The documents of a YAML file as dicts, lists and strings; `name` is its name in errors. Raises DataError."""
    import yaml  # type: ignore[import-untyped]  # imported late: only YAML files need it

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    found: list[Any] = []
    open_: list[_Node] = []  # the collections that have begun and not ended, outermost first
    try:
        for event in yaml.parse(data, Loader=loader):
            place = f"{name}:{event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise DataError(f"{place}: found an anchor or an alias; expected plain values. Write the value out")
            if isinstance(event, yaml.CollectionEndEvent):
                value = open_.pop().value
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(open_) == _MAX_DEPTH:
                    raise DataError(f"{place}: found nesting deeper than {_MAX_DEPTH} levels; expected conversations")
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
    """A list or mapping under construction."""

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
