"""Which files of a folder or an archive are read, by name alone; a file that is named itself may be called anything."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath

#: Endings of corpus files, each also with one of `PACKED` after it.
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".yml", ".yaml")
PACKED = (".gz", ".zst", ".bz2", ".xz")
_CORPUS = re.compile(r"(?i)\.(jsonl?|ndjson|parquet|csv|tsv|ya?ml)(\.(gz|zst|bz2|xz))?$")
#: Archives: opened where they lie in a folder, not where they lie in another archive.
_ARCHIVE = re.compile(r"(?i)\.(zip|tar(\.(gz|zst|bz2|xz))?|tgz|tzst|tbz2?|txz)$")
_TEXT = re.compile(r"(?i)\.txt(\.(gz|zst|bz2|xz))?$")
#: Texts that stand beside a corpus and are none.
_NOTES = re.compile(r"(?i)^(readme|licen[cs]e|notice|copying|changelog|changes|authors|requirements)\b")
#: DailyDialog's texts, and beside them its labels, which are no dialogues.
_DIALOGUES = re.compile(r"dialogues_(?!act|emotion|topic)\w+\.txt$")
_LABELS = re.compile(r"dialogues_(act|emotion|topic)\w*\.txt$")
#: All endings that say how a file is written, for names made from file names.
_ENDINGS = re.compile(r"(?i)(\.(jsonl?|ndjson|txt|parquet|csv|tsv|ya?ml|gz|zst|bz2|xz|zip|tar|tgz|tzst|tbz2?|txz))+$")


def is_corpus(name: str) -> bool:
    return _CORPUS.search(name) is not None and not is_hidden(name)


def is_archive(name: str) -> bool:
    return _ARCHIVE.search(name) is not None and not is_hidden(name)


def is_dialogues(name: str) -> bool:
    """Whether a name is that of one of DailyDialog's texts."""
    return _DIALOGUES.search(name) is not None


def is_text(name: str) -> bool:
    """Whether a name is that of a text that may hold dialogues: no labels, no notes."""
    base = PurePosixPath(name).name
    return bool(_TEXT.search(base)) and not (is_hidden(name) or _LABELS.search(base) or _NOTES.search(base))


def is_hidden(name: str) -> bool:
    """Whether a name or a folder on its way begins with a dot, or is what macOS adds to archives."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in PurePosixPath(name).parts)


def chosen(names: Sequence[str], *, texts: bool = True, only: bool = True) -> list[str]:
    """Which of a folder's or an archive's files are read, in their order: all corpora and DailyDialog's texts.

    Where there are none: `texts` of other names, and without those the `only` file, whatever it is called.
    """
    dialogues = [name for name in names if is_dialogues(name)]
    if len(dialogues) > 1:  # `dialogues_text.txt` holds the splits together, once more
        dialogues = [name for name in dialogues if PurePosixPath(name).name != "dialogues_text.txt"]
    read = [name for name in names if is_corpus(name) or name in dialogues]
    if not read and texts:
        read = [name for name in names if is_text(name)]
    if not read and only:
        read = [name for name in names if len(names) == 1 and not is_hidden(name)]
    return read


def passed_over(names: Sequence[str], read: Sequence[str]) -> list[str]:
    """The names that are not read and that somebody may miss: hidden files only where they are called like corpora."""
    taken = set(read)
    return [
        name
        for name in names
        if name not in taken and (not is_hidden(name) or (_CORPUS.search(name) and not _is_fork(name)))
    ]


def _is_fork(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith("._") or "__MACOSX" in path.parts


def stem_of(name: str) -> str:
    """A name without folders and endings: what records without an id are named after."""
    base = PurePosixPath(name).name
    return printable(_ENDINGS.sub("", base) or base)


def printable(name: str) -> str:
    """A name as reports show it: control characters, line breaks and bytes that are no UTF-8 are escaped."""
    return "".join(
        ascii(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char for char in name
    )


def expected() -> str:
    return f"files ending in {', '.join(SUFFIXES)} (or one of these and {', '.join(PACKED)}), or .txt alone"
