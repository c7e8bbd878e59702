"""How work and results are shown: reporters of progress and notes, and the parts that views are drawn with.

Library functions take a `Reporter` and never print. `LogReporter`, their default, writes notes to the log
`ismdata`; the command line passes a `TerminalReporter`, which draws on stderr.

Names, ids and texts come from files and from users. Only this module hands them to a stream: `note` prints a line,
`draw` a drawing and `print_json` an object. None of them reads markup (`[bold]`, `:smile:`) in a text, and none lets a
control character through.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ismdata.errors import DataError

#: Characters that could drive a terminal (controls), reorder what it shows (bidirectional marks), break a line where
#: none is meant, or not be encoded (surrogates: bytes of a file name that is not UTF-8). Tabs and line breaks stay.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

#: Width of what is drawn into a file or a pipe: there is no window to fit, so most names and paths stay whole.
_FILE_WIDTH = 160

#: What is printed for our own signs where the encoding of a stream lacks them.
_ASCII = dict(zip("▀▄─│·–×✗●○┌┐└┘█▉▊▋▌▍▎▏", '"_-|--xx*o++++########', strict=True))
_ASCII |= {"…": "...", "→": "->", "✓": "ok", "⏎": "\\n"}

#: Width of a full bar, in characters.
_BAR_WIDTH = 32

_EIGHTHS = " ▏▎▍▌▋▊▉"


if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

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


def note(text: str, *, style: str = "") -> None:
    """Print one line for the user on stderr.

    Args:
        text: The line. Line breaks in it, as a file name may have, are shown as signs.
        style: What rich calls a style; a terminal shows it, and breaks the line at words.
    """
    stream = _ready(sys.stderr)
    if stream is None:
        return
    line = one_line(text)
    if style and stream.isatty():
        _console(stream).print(Text(line, style))
    else:
        print(line, file=stream, flush=True)


def write_text(text: str) -> None:
    """Write a piece of text on stdout at once, as it is.

    Args:
        text: The text. For a terminal it must have gone through `printable`.

    Raises:
        DataError: If stdout cannot be written, as on a full disk.
    """
    with _stdout("What was written before is whole") as stream:
        stream.write(text)


def draw(drawing: RenderableType, *, whole_lines: bool = False) -> None:
    """Print a drawing on stdout.

    Args:
        drawing: What rich can draw. Texts in it are printed as they are: none is markup.
        whole_lines: Let the terminal wrap lines, so that they can be copied whole.

    Raises:
        DataError: If stdout cannot be written, as on a full disk.
    """
    with _stdout() as stream:
        stdout_console(stream).print(_Printable(drawing), soft_wrap=whole_lines)


def print_json(facts: Any) -> None:
    """Print a JSON object on stdout.

    Args:
        facts: The object.

    Raises:
        DataError: If stdout cannot be written, as on a full disk.
    """
    with _stdout() as stream:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = json.dumps(facts, ensure_ascii=not encoding.lower().startswith("utf"), indent=2)
        print(_UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text), file=stream)


@contextlib.contextmanager
def _stdout(
    advice: str = "What the command writes elsewhere is complete: print it again with `ismdata inspect`",
) -> Iterator[TextIO]:
    """The standard output, flushed at the end; one in memory if it is closed.

    Raises:
        DataError: If it cannot be written, as on a full disk.
    """
    stream = _ready(sys.stdout)
    if stream is None:
        yield io.StringIO()
        return
    try:
        yield stream
        stream.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does; Typer ends the command silently
        raise
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - else Python tries to write the rest again at its end
            os.dup2(nowhere.fileno(), stream.fileno())
        raise DataError(f"standard output: {error.strerror}; expected to print. {advice}") from error


def stdout_console(stream: TextIO | None = None) -> Console:
    """The console on stdout that views are drawn on.

    Its width is COLUMNS if that is set; otherwise that of the terminal, which with FORCE_COLOR is also that of a pager
    behind a pipe (`FORCE_COLOR=1 ismdata inspect packed --row 0 | less -R`); 160 in other pipes and files.
    """
    console = _console(stream)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _FILE_WIDTH
    return console


def _console(stream: TextIO | None) -> Console:
    """The only console. It takes no string for markup, not in the cells of tables either."""
    return Console(file=stream, markup=False, emoji=False, highlight=False)


def on_terminal() -> bool:
    """Whether stderr, where progress is shown, is a terminal.

    Returns:
        False too if it is closed.
    """
    return sys.stderr is not None and sys.stderr.isatty()


def make_tolerant() -> None:
    """Let stdout and stderr print any text, for what other packages print: Typer's help, Python's tracebacks."""
    _ready(sys.stdout)
    _ready(sys.stderr)


def _ready(stream: TextIO | None) -> TextIO | None:
    """Let a stream print any text, whatever its encoding. None is a closed one."""
    if stream is not None and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="ismdata")
    return stream


def _encodable(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: our own signs by ASCII ones, the rest by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    texts = (_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in missing)
    return "".join(texts), error.end


codecs.register_error("ismdata", _encodable)


class _Printable:
    """A drawing of which each piece of text goes through `printable`."""

    def __init__(self, drawing: RenderableType) -> None:
        self.drawing = drawing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.drawing, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class TerminalReporter:
    """The command line's reporter: progress bars on a terminal, plain lines elsewhere; all of it on stderr.

    A stage has a bar from its first report until it is complete, so that a terminal shows only what is going on.
    Elsewhere a stage is a line every ten seconds. A context manager: bars are removed at the end.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lined: dict[str, float] = {}

    def __enter__(self) -> TerminalReporter:
        if on_terminal():
            self._console = _console(_ready(sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._console = None

    def note(self, text: str) -> None:
        if self._console is None:
            note(text)
        else:
            # Lines break between words; a path stays in one piece.
            self._console.print(Text(one_line(text), overflow="ignore"))

    def progress(self, stage: str, done: int, total: int) -> None:
        if self._console is not None:
            self._draw(self._console, stage, done, total)
            return
        now = time.monotonic()
        if now - self._lined.setdefault(stage, now) >= _LINE_EVERY:
            self._lined[stage] = now
            note(f"{stage}: {done:,} of {total:,}" if total else f"{stage}: {done:,}")
        if total and done >= total:
            del self._lined[stage]

    def _draw(self, console: Console, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            # Started with the first stage: until then a library may draw on the terminal, such as a download.
            self._bar = _progress_bar(console)
            self._bar.start()
        if total and done >= total:
            if stage in self._tasks:
                self._bar.remove_task(self._tasks.pop(stage))
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(printable(stage), total=total or None)
        self._bar.update(self._tasks[stage], completed=done, total=total or None)


def _progress_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(bar_width=None), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


@dataclass(frozen=True, kw_only=True)
class View:
    """Facts, and a drawing of exactly these facts.

    `as_json()` is for programs; rich prints the drawing for people.

    Attributes:
        facts: A JSON object.
        drawing: What rich prints. It says with letters what it says with colours, so that a pipe loses nothing.
        whole_lines: Lines stay whole, whatever the width, so that paths can be copied.
    """

    facts: dict[str, Any]
    drawing: RenderableType
    whole_lines: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the facts."""
        return self.facts

    def __rich__(self) -> RenderableType:
        return self.drawing


def title(name: str, rest: str) -> Text:
    """The first line of a view."""
    return Text.assemble((one_line(name), "bold"), "  ", (one_line(rest), "dim"))


def heading(text: str, rest: str = "") -> Text:
    """The line above a part of a view."""
    return Text.assemble("\n", (one_line(text), "bold"), "  ", (one_line(rest), "dim"))


def numbers(*lines: tuple[str, int, str | Text]) -> RenderableType:
    """A table of (name, number, remark)."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    for name, number, rest in lines:
        table.add_row(one_line(name), f"{number:,}", rest)
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


def one_line(text: str) -> str:
    """Make a text printable, with its line breaks as signs.

    Args:
        text: Any text, such as a file name.

    Returns:
        One line.

    >>> one_line("a\\nb")
    'a␊b'
    """
    return printable(text).replace("\n", "␊")


def printable(text: str) -> str:
    """Replace characters that could deceive the reader of a terminal; tabs and line breaks stay.

    Args:
        text: Any text, of a corpus or a file name.

    Returns:
        The text with controls as their Unicode pictures (U+FFFD where there is none), and bidirectional marks, line
        separators and surrogates as escapes.

    >>> printable("a\\x1b[2J")
    'a␛[2J'
    """
    return _UNPRINTABLE.sub(_visible, text)


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code < 0xA0:
        return "␡" if code == 0x7F else "\ufffd"
    return f"\\u{code:04x}"
