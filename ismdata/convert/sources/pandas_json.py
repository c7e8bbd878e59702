"""JSON files as `DataFrame.to_json` writes them: by column (its default), `orient="split"` and `orient="table"`.

The rows of such a file are known only at its end, so the file is read at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ismdata.convert.json_values import parse_json
from ismdata.convert.sources.blocks import ValueBlock
from ismdata.convert.sources.framing import ByteQueue, Framed

LAYOUT = "pandas JSON"
#: A column of numbered rows, the list of columns, or the schema: how these files begin.
_OPENING = re.compile(
    rb'\s*\{\s*("(?:[^"\\\n]|\\.)*"\s*:\s*\{\s*"\d+"\s*:|"columns"\s*:\s*\[|"schema"\s*:\s*\{\s*"fields")'
)


def detect_pandas(queue: ByteQueue, is_record: Callable[[Any], bool]) -> Callable[[ByteQueue], Iterator[Framed]] | None:
    """The framing function of a file that pandas wrote, None for other files.

    Args:
        queue: The file from its first byte. It is read to its end if it begins like such a file.
        is_record: Whether a value is a record of some format.
    """
    if _OPENING.match(queue.data) is None:
        return None
    while queue.more():
        pass
    try:
        rows = _rows(parse_json(queue.data.decode("utf-8")), is_record)
    except ValueError:
        return None
    return None if not rows else partial(_frame, rows=rows)


def _frame(queue: ByteQueue, rows: list[dict[str, Any]]) -> Iterator[Framed]:
    queue.drop(len(queue.data))
    yield Framed(block=ValueBlock(values=rows, numbers=np.arange(1, len(rows) + 1)))


def _rows(value: Any, is_record: Callable[[Any], bool]) -> list[dict[str, Any]] | None:
    """The rows of a data frame as records, None if the value is none.

    >>> _rows({"prompt": {"0": "Q"}, "completion": {"0": "A"}}, bool)
    [{'prompt': 'Q', 'completion': 'A'}]
    >>> _rows({"columns": ["prompt", "completion"], "index": [0], "data": [["Q", "A"]]}, bool)
    [{'prompt': 'Q', 'completion': 'A'}]
    """
    if not isinstance(value, dict):
        return None
    data, columns = value.get("data"), value.get("columns")
    if {"schema", "data"} == value.keys():
        return _objects(data)
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"} and isinstance(columns, list):
        whole = isinstance(data, list) and all(isinstance(row, list) and len(row) == len(columns) for row in data)
        named = all(isinstance(name, str) for name in columns) and len({*columns}) == len(columns)
        return [dict(zip(columns, row, strict=True)) for row in data] if whole and named else None  # type: ignore[union-attr]
    return _by_column(value, is_record)


def _objects(data: Any) -> list[dict[str, Any]] | None:
    return data if isinstance(data, list) and all(isinstance(row, dict) for row in data) else None


def _by_column(value: dict[str, Any], is_record: Callable[[Any], bool]) -> list[dict[str, Any]] | None:
    """The rows of an object of columns, each an object of cells by the row's label."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, dict) for column in columns):
        return None
    labels = [*columns[0]]
    if any([*column] != labels for column in columns):
        return None
    rows = [{name: column[label] for name, column in value.items()} for label in labels]
    # Conversations by name, each an object of numbered turns, look the same, but their "cells" are objects.
    if not rows or any(isinstance(cell, dict) for cell in rows[0].values()):
        return None
    return rows if is_record(rows[0]) or not any(isinstance(cell, list) for cell in rows[0].values()) else None
