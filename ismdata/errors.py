"""The exceptions that users see.

Every message names the place, what was found, what was expected and what to do. There are two kinds because the command
line has two exit codes for them: 1 if the data or a file is at fault, 2 if the call is. Any other exception is a bug in
ismdata and keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path


class IsmdataError(Exception):
    """Base of every error that ismdata raises on purpose. `exit_code` is that of the command."""

    exit_code = 1


class DataError(IsmdataError):
    """A file or its content is at fault: it is missing, broken, refused or changed. Exit code 1."""


class UsageError(IsmdataError):
    """The call is at fault: an option has an impossible value, or two options exclude each other. Exit code 2."""

    exit_code = 2


class UnsupportedModelError(IsmdataError):
    """The mask cannot work inside the model that `attach` was given; the message says why. Exit code 1."""


class Terminated(BaseException):
    """The process received SIGTERM.

    Attributes:
        kept: The folder with which the same command resumes; None if there is none.
    """

    kept: Path | None = None


class Refused(Exception):
    """One record or conversation cannot be used, and goes to quarantine.

    Attributes:
        reason: A key of `conversation.REASONS`. Subclasses for one reason have it as a class attribute.
        detail: One sentence for the user: what was found, what was expected and what to do.
    """

    reason: str

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


#: The longest repr of a value in an error message, in characters.
_SHOWN = 80


def shown(value: object) -> str:
    """The repr of a value for an error message, shortened if it is long.

    Args:
        value: Any value.

    Returns:
        At most 80 characters.

    >>> shown("bot")
    "'bot'"
    """
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
