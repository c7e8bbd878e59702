"""How work and results are shown: reporters of progress and notes, and the parts that views are drawn with.

Library functions take a `Reporter` and never print. `LogReporter`, their default, writes notes to the log
`ismdata`; the command line passes a `TerminalReporter`, which draws on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

#: What `printable` writes for each control character: its Unicode picture, or U+FFFD where there is none. A corpus
#: must not be able to move the cursor of the person who looks at it.
_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


#: Width of a full bar, in characters.
_BAR_WIDTH = 32

_EIGHTHS = " ▏▎▍▌▋▊▉"


if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LOG = logging.getLogger("ismdata")

#: Seconds between two plain lines about one stage.
_LINE_EVERY = 10.0


class Reporter(Protocol):
    """Receives what a long computation tells while it runs."""

    def note(self, text: str) -> None:
        """Receive one line that the user should read."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Receive how far a stage is, in units of its own; `total` is 0 where it is not known."""


class LogReporter:
    """The library's default: notes go to the log `ismdata`, progress is not reported.

    Example:
        >>> LogReporter().note("nothing is printed")
    """

    def __repr__(self) -> str:
        return "LogReporter()"

    def note(self, text: str) -> None:
        _LOG.info(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        pass


#: Stateless, so that functions share it as their default.
LOGGED = LogReporter()


def note(text: str) -> None:
    """Print one line for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


class TerminalReporter:
    """The command line's reporter: a progress bar on a terminal, plain lines elsewhere; all of it on stderr.

    A context manager: the bar is removed at the end.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._lined: dict[str, float] = {}

    def __enter__(self) -> TerminalReporter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        note(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total or None)
            self._bar.update(self._tasks[stage], completed=done, total=total or None)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        if now - self._lined.setdefault(stage, now) >= _LINE_EVERY:
            self._lined[stage] = now
            note(f"{stage}: {done:,} of {total:,}" if total else f"{stage}: {done:,}")


@dataclass(frozen=True, kw_only=True)
class View:
    """Facts, and a drawing of exactly these facts.

    `as_json()` is for programs; rich prints the drawing for people.

    Attributes:
        facts: A JSON object.
        drawing: What rich prints. It says with letters what it says with colours, so that a pipe loses nothing.
    """

    facts: dict[str, Any]
    drawing: RenderableType

    def as_json(self) -> dict[str, Any]:
        """Return the facts."""
        return self.facts

    def __rich__(self) -> RenderableType:
        return self.drawing


#: Width of what is drawn into a file or a pipe: there is no window to fit, so most names and paths stay whole.
_FILE_WIDTH = 160


def stdout_console() -> Console:
    """The console on stdout that views are drawn on.

    Its width is COLUMNS if that is set; otherwise that of the terminal, which with FORCE_COLOR is also that of a pager
    behind a pipe (`FORCE_COLOR=1 ismdata inspect packed --row 0 | less -R`); 160 in other pipes and files.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _FILE_WIDTH
    return console


def title(name: str, rest: str) -> Text:
    """The first line of a view."""
    return Text.assemble((name, "bold"), "  ", (rest, "dim"))


def heading(text: str, rest: str = "") -> Text:
    """The line above a part of a view."""
    return Text.assemble("\n", (text, "bold"), "  ", (rest, "dim"))


def numbers(*lines: tuple[str, int, str | Text]) -> RenderableType:
    """A table of (name, number, remark)."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    for name, number, rest in lines:
        table.add_row(name, f"{number:,}", rest)
    return Padding(table, (1, 0, 0, 2))


def bar(share: float, width: int = _BAR_WIDTH) -> str:
    """A bar for a share of 0 to 1, precise to an eighth of a character. Any share above 0 is visible."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def share_bar(share: float, what: str, style: str) -> Text:
    """A bar, the share in percent, and what it is a share of."""
    return Text.assemble((f"{bar(share, 20):<20}", style), f" {share:6.1%} {what}".rstrip())


def histogram_bars(title: str, counts: list[dict[str, int]]) -> list[RenderableType]:
    """A histogram; each entry of `counts` has `from`, `to` (inclusive) and `count`."""
    if not counts:
        return []
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column(style="cyan")
    table.add_column(justify="right")
    tallest = max(count["count"] for count in counts)
    for count in counts:
        name = f"{count['from']:,}" if count["from"] == count["to"] else f"{count['from']:,}–{count['to']:,}"
        table.add_row(name, f"{bar(count['count'] / tallest):<{_BAR_WIDTH}}", f"{count['count']:,}")
    return [heading(title), Padding(table, (0, 0, 0, 2))]


def printable(text: str) -> str:
    """Replace control characters, except tabs and line breaks, by visible ones."""
    return text.translate(_PICTURES)
