"""Break streamed text into lines at words, by the width that characters have in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from rich.cells import cell_len

#: Characters that no line begins with, and that none ends with.
_NOT_FIRST = frozenset("、。，．：；！？）】」』〉》〕｝％℃…ー々ゝ・)]}.,:;!?%\"'”’")
_NOT_LAST = frozenset("（【「『〈《〔｛([{“‘")

_JOINER = "\u200d"

#: The mark around code, in which the terminal breaks lines: copied code then keeps its own.
_FENCE = "```"


class WordWrap:
    """Breaks text that comes in pieces.

    The last word is held back until it is complete. A word longer than a line is left to the terminal. Between
    Chinese and Japanese characters a line may break anywhere but before closing and after opening punctuation.

    Args:
        width: Returns the columns of the terminal; asked for each word, so that resizing works.

    Example:
        >>> wrap = WordWrap(lambda: 10)
        >>> wrap.feed("three litt") + wrap.feed("le words") + wrap.end()
        'three\\nlittle\\nwords'
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._line = ""  # what the current line of the screen has
        self._gap = ""  # spaces after it
        self._word = ""  # what follows, and is held back
        self._is_long = False  # whether a word longer than a line is being written
        self._start = ""  # the beginning of the text's own line, as long as it may be a fence
        self._in_code = False

    def feed(self, text: str) -> str:
        """Take the next piece of text and return what to write."""
        return "".join(map(self._add, text))

    def end(self) -> str:
        """Return what is left to write, and begin anew."""
        rest = self._place()
        self.__init__(self._width)  # type: ignore[misc]
        return rest

    def _add(self, character: str) -> str:
        if character == "\n":
            placed = self._place()
            if self._start.strip().startswith(_FENCE):
                self._in_code = not self._in_code
            self._line = self._gap = self._start = ""
            self._is_long = False
            return placed + "\n"
        if len(self._start) < 2 * len(_FENCE):
            self._start += character
        if self._in_code:
            return character
        if character in " \t":
            placed = self._place()
            self._is_long = False
            self._gap += " " if character == " " else " " * (8 - cell_len(self._line + self._gap) % 8)
            return placed
        placed = self._place() if self._word and _may_break(self._word[-1], character) else ""
        self._word += character
        self._is_long = self._is_long or cell_len(self._word) > self._width()
        return placed + self._place() if self._is_long else placed

    def _place(self) -> str:
        """Write the word that was held back, on the next line if it does not fit."""
        if not self._word:
            return ""
        gap, word = self._gap, self._word
        self._gap = self._word = ""
        if self._line and not self._is_long and cell_len(self._line + gap + word) > self._width():
            self._line = word
            return "\n" + word
        self._line += gap + word
        if self._is_long:  # the terminal breaks it
            self._line = " " * (cell_len(self._line) % max(self._width(), 1))
        return gap + word


def _may_break(before: str, after: str) -> bool:
    """Whether a line may break between two characters that no space separates."""
    if not (_is_ideograph(before) or _is_ideograph(after)):
        return False
    joined = after == _JOINER or before == _JOINER or unicodedata.category(after) in ("Mn", "Me", "Mc", "Sk")
    return not joined and after not in _NOT_FIRST and before not in _NOT_LAST


def _is_ideograph(character: str) -> bool:
    """Whether a character is wide and stands for itself. Korean has spaces between its words."""
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and not unicodedata.name(character, "").startswith("HANGUL")
