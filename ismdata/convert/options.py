"""The options of `convert`: how records are read, which conversations are kept, and how many workers read.

`ConvertOptions` becomes two things for the modules below: `Choices` (corpus_format.py), which a format follows where it
has a field for one, and `Rules` (canonical.py), which apply to all formats alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ismdata.choices import Dedup, Paths, Preference, Side, check_choice
from ismdata.convert.canonical import role_table
from ismdata.convert.formats.registry import FORMATS
from ismdata.convert.sampling import parse_split
from ismdata.convert.sources.find import KEEP, chosen_splits
from ismdata.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which conversations to drop.

    Attributes:
        dedup: Drop conversations that repeat an earlier one: "exact" those that are the same, "near" similar ones too.
        min_turns: Drop conversations with fewer user and assistant messages.
        exclude: Drop conversations in which one of these regular expressions (Python's `re`) matches a content.

    Raises:
        UsageError: If a value is out of range, or a pattern is not a regular expression.
    """

    dedup: Dedup | None = None
    min_turns: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dedup is not None:
            check_choice("--dedup", self.dedup, Dedup)
        if self.min_turns < 0:
            raise UsageError(f"--min-turns {self.min_turns}: expected 0 or more")
        self.patterns()

    def patterns(self) -> list[re.Pattern[str]]:
        """Compile `exclude`."""
        return [_compile(pattern) for pattern in self.exclude]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        pattern.encode()
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise UsageError(
            f"--exclude {pattern!r}: not a regular expression ({error}); expected the syntax of Python's re module. "
            "Put a backslash before a special character that is meant literally"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which conversations to write, and to which folders. The default writes all of them to one folder.

    Attributes:
        cleaning: Which conversations to drop.
        against: Sources or converted folders whose conversations are dropped.
        sample: How many conversations to draw at random from the rest; None keeps all.
        seed: Seed of the sample.
        split: The shares of train and validation (and test), such as "0.98/0.02"; None draws no split.
        splits: What happens to splits that the sources name, such as train and test: "keep" writes each to a folder
            of its own, "merge" all to one; other words, such as "train,test", are the names of those to read.

    Raises:
        UsageError: If the sample is below 1, the shares do not add up to 1, or `splits` has an empty name.
    """

    cleaning: Cleaning = field(default_factory=Cleaning)
    against: tuple[str, ...] = ()
    sample: int | None = None
    seed: int = 0
    split: str | None = None
    splits: str = KEEP

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise UsageError(f"--sample {self.sample}: expected 1 or more")
        if self.split is not None:
            parse_split(self.split)
        chosen_splits(self.splits)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How `convert` reads records, and what it keeps of them.

    Attributes:
        format: The corpus format, a key of FORMATS, or "auto" to detect it from the records of each file.
        mapping: A TOML file that describes any other format; see docs/mapping.md.
        roles: Names of roles to canonical roles, in addition to the usual names. They override those of the mapping.
        assistant: Which of two speakers is trained if nobody is known to be the assistant. None: as the mapping says,
            else the second.
        tree: Which paths of trees of messages to read.
        preference: Which answers of preference data to read. None refuses such records.
        join: Merge consecutive messages of the same role, with a line break between them.
        selection: Which conversations to write.
        workers: How many blocks to read in parallel, 0 for one per CPU core.
        processes: Whether worker processes may be started where threads are slow (`WorkerPool`). Each imports the main
            module of the program, so a script must guard its calls by `if __name__ == "__main__"`.

    Raises:
        UsageError: If a value is out of range, or two options exclude each other.
    """

    format: str = "auto"
    mapping: Path | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    assistant: Side | None = None
    tree: Paths = "all"
    preference: Preference | None = None
    join: bool = False
    selection: Selection = field(default_factory=Selection)
    workers: int = 0
    processes: bool = False

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise UsageError(f"--format {self.format}: unknown format; expected auto, {', '.join(FORMATS)}")
        if self.format != "auto" and self.mapping is not None:
            raise UsageError(f"--format {self.format} and --mapping exclude each other; leave one out")
        role_table(self.roles)
        if self.assistant is not None:
            check_choice("--assistant", self.assistant, Side)
        check_choice("--tree", self.tree, Paths)
        if self.preference is not None:
            check_choice("--preference", self.preference, Preference)
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: expected 0 (one per CPU core) or more")

    def recorded(self) -> dict[str, Any]:
        """The options that the output depends on, as JSON values, by their names on the command line."""
        return {
            "format": self.format,
            "mapping": self.mapping.read_text(encoding="utf-8") if self.mapping else None,
            "role": dict(sorted(self.roles.items())),
            "assistant": self.assistant,
            "tree": self.tree,
            "preference": self.preference,
            "join": self.join,
            **asdict(self.selection.cleaning),
            "against": list(self.selection.against),
            "sample": self.selection.sample,
            "seed": self.selection.seed,
            "split": self.selection.split,
            "splits": self.selection.splits,
        }
