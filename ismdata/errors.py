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
