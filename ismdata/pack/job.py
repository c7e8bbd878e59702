"""What all stages of one `pack` run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ismdata.data import ConvertedFolder, Journal
from ismdata.display import Reporter
from ismdata.pack.options import PackOptions
from ismdata.rendering import Encoding


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """One run of `pack`: its input, how it tokenizes, and where it writes and reports.

    Attributes:
        sources: The converted folders.
        encoding: The tokenizer and its chat template.
        options: The options of the call.
        folder: The unfinished output folder.
        journal: Records in `folder` what is done, so that an interrupted run can resume.
        reporter: Receives notes and progress.
    """

    sources: Sequence[ConvertedFolder]
    encoding: Encoding
    options: PackOptions
    folder: Path
    journal: Journal
    reporter: Reporter

    @property
    def conversations(self) -> int:
        """Number of conversations in all sources."""
        return sum(source.rows for source in self.sources)
