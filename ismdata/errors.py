"""The exceptions a user can meet. Each message names the place, what was found, what was expected and what to do.

Two kinds, because the command line has two exit codes for them: the data or a file is at fault (1), or the call is (2).
Anything else that escapes is a bug in ismdata and keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path


class IsmdataError(Exception):
    """Base of every error that ismdata raises on purpose."""

    exit_code = 1


class DataError(IsmdataError):
    """A file or its content is at fault: missing, broken, refused, changed. Exit code 1."""


class UsageError(IsmdataError):
    """The call is at fault: an option that cannot be, or two that exclude each other. Exit code 2."""

    exit_code = 2


class UnsupportedModelError(IsmdataError):
    """`attach` was given a model inside which the mask cannot work; the message says why. Exit code 1."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM). `kept`: the folder with which the same command goes on, if one does."""

    kept: Path | None = None


class Refused(Exception):
    """One record cannot be used: `reason` is a key of `conversation.REASONS`, `detail` the sentence a person reads."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


#: How much of a found value an error message shows, in characters.
_SHOWN = 80


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
