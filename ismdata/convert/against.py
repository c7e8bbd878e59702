"""The corpora of `--against`: the digests of their conversations, which `convert` then drops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ismdata.convert.canonical import Rules
from ismdata.convert.digests import Digests, digests
from ismdata.convert.parts import FormatChoice, open_parts
from ismdata.convert.read_block import read_block
from ismdata.convert.sources.find import MERGE, find_sources
from ismdata.convert.sources.source_types import AnySource


@dataclass(frozen=True, kw_only=True)
class OtherCorpus:
    """A corpus whose conversations are dropped: sources, among them converted folders."""

    name: str
    sources: tuple[AnySource, ...]

    @classmethod
    def find(cls, argument: str) -> OtherCorpus:
        """The corpus that an argument of `--against` names. Raises DataError if there is none."""
        return cls(name=argument, sources=find_sources([argument], splits=MERGE).sources)

    def identity(self) -> dict[str, Any]:
        """What tells without reading whether the corpus is unchanged, as JSON values."""
        return {"name": self.name, "sources": [source.identity() for source in self.sources]}

    def digests(self, format: FormatChoice, rules: Rules) -> Digests:
        """The digests of all conversations, uint64[N, 2]. Raises DataError if the corpus cannot be read."""
        tables = (
            read_block(block, rules).rows
            for source in self.sources
            for part in open_parts(source, format)
            for block in part.blocks
        )
        return np.concatenate([np.empty((0, 2), np.uint64), *map(digests, tables)])
