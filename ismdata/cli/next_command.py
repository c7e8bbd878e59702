"""Commands as a user types them, for the lines that say what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path


def command_line(*words: object) -> str:
    """A command line of `ismdata`, which a shell reads back as these words.

    Args:
        words: Command, arguments and options. A path that begins like an option is written so that it is none.

    Returns:
        The line.

    Example:
        >>> command_line("chat", Path("my model"))
        "ismdata chat 'my model'"
        >>> command_line("chat", Path("-o"))
        'ismdata chat ./-o'
    """
    return shlex.join(["ismdata", *(f"./{word}" if _looks_like_option(word) else str(word) for word in words)])


def _looks_like_option(word: object) -> bool:
    return isinstance(word, Path) and str(word).startswith("-")
