"""Which files of a folder or an archive are read, by name alone. A file given by the user can have any name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath

#: Endings of corpus files, each also followed by one of `COMPRESSED`.
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".yml", ".yaml")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

_DATA = "jsonl?|ndjson|parquet|csv|tsv|ya?ml"
_COMPRESSION = "gz|zst|bz2|xz"
_PACKED_TAR = "tgz|tzst|tbz2?|txz"


def _ending(kinds: str) -> re.Pattern[str]:
    """Matches the end of a name of one of these kinds, compressed or not."""
    return re.compile(rf"(?i)\.({kinds})(\.({_COMPRESSION}))?$")


_CORPUS, _TEXT, _YAML, _TABLE = map(_ending, (_DATA, "txt", "ya?ml", "[ct]sv"))
#: Archives are opened in a folder, but not inside another archive.
_ARCHIVE = re.compile(rf"(?i)\.(zip|tar(\.({_COMPRESSION}))?|{_PACKED_TAR})$")
#: Texts that accompany a corpus.
_NOTES = re.compile(r"(?i)^(readme|licen[cs]e|notice|copying|changelog|changes|authors|requirements)\b")
#: DailyDialog's texts, and its labels, which are no dialogues.
_DIALOGUES = re.compile(r"dialogues_(?!act|emotion|topic)\w+\.txt$")
_LABELS = re.compile(r"dialogues_(act|emotion|topic)\w*\.txt$")
#: All endings that say how a file is written.
_ENDINGS = re.compile(rf"(?i)(\.({_DATA}|txt|{_COMPRESSION}|zip|tar|{_PACKED_TAR}))+$")


def is_corpus(name: str) -> bool:
    return _CORPUS.search(name) is not None and not is_hidden(name)


def is_archive(name: str) -> bool:
    return _ARCHIVE.search(name) is not None and not is_hidden(name)


def is_yaml(name: str) -> bool:
    return _YAML.search(name) is not None


def is_table(name: str) -> bool:
    return _TABLE.search(name) is not None


def is_dialogues(name: str) -> bool:
    """Whether a name is that of one of DailyDialog's texts."""
    return _DIALOGUES.search(name) is not None


def is_text(name: str) -> bool:
    """Whether a name is that of a text that may hold dialogues: no labels, no notes."""
    base = PurePosixPath(name).name
    return bool(_TEXT.search(base)) and not (is_hidden(name) or _LABELS.search(base) or _NOTES.search(base))


def is_hidden(name: str) -> bool:
    """Whether a name or one of its folders begins with a dot, or macOS added it to an archive."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in PurePosixPath(name).parts)


def has_file_ending(name: str) -> bool:
    """Whether a name ends like a file: no name on the Hugging Face hub does."""
    return _ENDINGS.search(name) is not None


def select_files(names: Sequence[str], *, texts: bool = True, only: bool = True) -> list[str]:
    """The files of a folder or an archive that are read, in their order: all corpora and DailyDialog's texts.

    Args:
        names: All files.
        texts: Read other texts if there is no corpus.
        only: Read a file of any name if it is the only one.

    Returns:
        The names of the files to read.
    """
    dialogues = [name for name in names if is_dialogues(name)]
    if len(dialogues) > 1:  # `dialogues_text.txt` repeats all splits
        dialogues = [name for name in dialogues if PurePosixPath(name).name != "dialogues_text.txt"]
    read = [name for name in names if is_corpus(name) or name in dialogues]
    if not read and texts:
        read = [name for name in names if is_text(name)]
    if not read and only:
        read = [name for name in names if len(names) == 1 and not is_hidden(name)]
    return read


def skipped_files(names: Sequence[str], read: Sequence[str]) -> list[str]:
    """The names that are not read and that a user may miss: hidden files only if they are named like corpora."""
    taken = set(read)
    return [
        name
        for name in names
        if name not in taken and (not is_hidden(name) or (_CORPUS.search(name) and not _is_fork(name)))
    ]


def _is_fork(name: str) -> bool:
    """Whether a file is a resource fork that macOS added."""
    path = PurePosixPath(name)
    return path.name.startswith("._") or "__MACOSX" in path.parts


def stem_of(name: str) -> str:
    """A name without folders and endings. Records without an id are named after it."""
    base = PurePosixPath(name).name
    return printable(_ENDINGS.sub("", base) or base)


def printable(name: str) -> str:
    """A name as reports show it: control characters, line breaks and bytes that are not UTF-8 are escaped."""
    return "".join(
        ascii(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char for char in name
    )


def expected_endings() -> str:
    return f"files ending in {', '.join(SUFFIXES)} (optionally followed by {', '.join(COMPRESSED)}), or only .txt files"
