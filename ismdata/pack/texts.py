"""The texts of a batch: built from contents and the text around them, and encoded once each.

A text is identified by its key: its shape (`SkeletonCache.shapes`) and the messages in its slots.

Shape legend: K texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.arrays import IntArray
from ismdata.pack.pieces import number_rows, pad_columns
from ismdata.pack.skeleton_cache import SkeletonCache, TextShape


@dataclass(frozen=True, kw_only=True)
class TextGroup:
    """Texts that are encoded in one call.

    Attributes:
        texts: The texts.
        opening: Whether they open a document; some tokenizers put a space before such texts.
        places: int64, where each text belongs in an array of the caller's.
    """

    texts: pa.LargeStringArray
    opening: bool
    places: IntArray


def merge_groups(groups: Iterable[TextGroup], *, openings_differ: bool) -> list[TextGroup]:
    """Merge groups into one; into two if texts that open a document are encoded differently."""
    found = [group if openings_differ else replace(group, opening=False) for group in groups]
    merged: list[TextGroup] = []
    for opening in (False, True):
        alike = [group for group in found if group.opening is opening]
        if len(alike) == 1:
            merged.append(alike[0])
        elif alike:
            texts = pa.concat_arrays([group.texts for group in alike])
            places = np.concatenate([group.places for group in alike])
            merged.append(TextGroup(texts=texts, opening=opening, places=places))
    return merged


class BatchTexts:
    """Builds the texts of a batch from their keys. contents: [M], the contents of its messages."""

    def __init__(self, cache: SkeletonCache, contents: pa.LargeStringArray) -> None:
        self._cache = cache
        self._stripped = {("", ""): contents}

    def of_keys(self, keys: IntArray) -> list[TextGroup]:
        """Return the texts of keys, int64[K, 1 + slots], in one group per shape."""
        groups = []
        for number in np.unique(keys[:, 0]).tolist():
            opening, shape = self._cache.shapes[number]
            places = np.flatnonzero(keys[:, 0] == number)
            groups.append(TextGroup(texts=self._fill(shape, keys[places, 1:]), opening=opening, places=places))
        return groups

    def _fill(self, shape: TextShape, messages: IntArray) -> pa.LargeStringArray:
        """The texts of one shape, one per row of messages in its slots."""
        columns: list[Any] = []
        slot = 0
        for part in shape:
            if isinstance(part, str):
                columns.append(pa.scalar(part, pa.large_string()))
            else:
                columns.append(self._contents(*part).take(pa.array(messages[:, slot])))
                slot += 1
        if len(columns) == 1:
            return columns[0]
        return pc.binary_join_element_wise(*columns, pa.scalar("", pa.large_string()))

    def _contents(self, left: str, right: str) -> pa.LargeStringArray:
        """The batch's contents, stripped as a slot requires."""
        if (left, right) not in self._stripped:
            column = self._stripped["", ""]
            if left == right == "blanks":
                column = pc.utf8_trim_whitespace(column)
            else:
                if left:
                    column = pc.utf8_ltrim_whitespace(column) if left == "blanks" else pc.utf8_ltrim(column, "\n")
                if right:
                    column = pc.utf8_rtrim_whitespace(column) if right == "blanks" else pc.utf8_rtrim(column, "\n")
            self._stripped[left, right] = column
        return self._stripped[left, right]


class EncodedTexts:
    """The runs of texts that have been encoded, by key."""

    def __init__(self) -> None:
        self._keys = np.empty((0, 1), np.int64)
        self._runs = np.empty(0, np.int64)

    def add(self, keys: IntArray, runs: IntArray) -> None:
        """Add distinct texts that are not known yet. keys: int64[K, 1 + slots]; runs: int64[K]."""
        width = max(keys.shape[1], self._keys.shape[1])
        self._keys = np.concatenate([pad_columns(self._keys, width), pad_columns(keys, width)])
        self._runs = np.concatenate([self._runs, runs])

    def runs_of(self, keys: IntArray, encode: Callable[[IntArray], IntArray]) -> IntArray:
        """Return the run of each text; `encode` is called with the distinct keys that are not known yet."""
        width = max(keys.shape[1], self._keys.shape[1])
        known = len(self._keys)
        every = np.ascontiguousarray(np.concatenate([pad_columns(self._keys, width), pad_columns(keys, width)]))
        numbers, firsts = number_rows(every)
        fresh = every[firsts[firsts >= known]]
        self.add(fresh, encode(fresh))
        return self._runs[numbers][known:]
