"""The corpora of `--against`: the digests of their conversations, which `convert` then drops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ismdata.convert.canonical import Rules
from ismdata.convert.digests import Digests, digests
from ismdata.convert.parts import FormatChoice, open_parts
from ismdata.convert.read_block import read_block
from ismdata.convert.sources.arguments import expand
from ismdata.convert.sources.source_types import SavedDataset, Source
from ismdata.data import INDEX_NAME, ConvertedFolder, describe_file


@dataclass(frozen=True, kw_only=True)
class OtherCorpus:
    """A corpus whose conversations are dropped: a converted folder, or sources if `folder` is None."""

    name: str
    folder: Path | None
    sources: tuple[Source | SavedDataset, ...] = ()

    @classmethod
    def find(cls, argument: str) -> OtherCorpus:
        """The corpus that an argument of `--against` names. Raises DataError if there is none."""
        folder = Path(argument)
        if (folder / INDEX_NAME).is_file():
            return cls(name=argument, folder=folder)
        return cls(name=argument, folder=None, sources=tuple(expand(argument)))

    def identity(self) -> dict[str, Any]:
        """What tells without reading whether the corpus is unchanged, as JSON values."""
        if self.folder is not None:
            return {"name": self.name, "sha256": describe_file(self.folder / INDEX_NAME, 0).sha256}
        return {"name": self.name, "sources": [source.identity() for source in self.sources]}

    def digests(self, format: FormatChoice, rules: Rules) -> Digests:
        """The digests of all conversations, uint64[N, 2]. Raises DataError if the corpus cannot be read."""
        return folder_digests(self.folder) if self.folder is not None else _concatenate(self._tables(format, rules))

    def _tables(self, format: FormatChoice, rules: Rules) -> Iterator[pa.Table]:
        for source in self.sources:
            for part in open_parts(source, format):
                yield from (read_block(block, rules).rows for block in part.blocks)


def folder_digests(folder: Path) -> Digests:
    """The digests of a converted folder, uint64[N, 2].

    Raises DataError if it is not one, or if a shard is missing, cut off or not readable.
    """
    return _concatenate(pa.Table.from_batches([batch]) for batch in ConvertedFolder(folder).batches())


def _concatenate(tables: Iterable[pa.Table]) -> Digests:
    return np.concatenate([np.empty((0, 2), np.uint64), *map(digests, tables)])
