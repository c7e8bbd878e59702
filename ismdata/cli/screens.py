"""What `ismdata chat` reads from and shows on: a terminal with line editing, or a pipe.

Answers go to stdout, everything else to stderr, so that `ismdata chat model < questions > answers` writes answers only:
each as the model generated it, and a line break.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ismdata.cli.word_wrap import WordWrap
from ismdata.display import note, printable, write_text

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

#: Entries of the history that are read.
_REMEMBERED = 1000


class PipeScreen:
    """Reads one question a line."""

    interactive = False
    keys = ""

    def __init__(self) -> None:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._wrap = WordWrap(lambda: shutil.get_terminal_size().columns) if on_terminal else None

    def read(self) -> str:
        line = "" if sys.stdin is None else sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def answer(self, piece: str) -> None:
        # A terminal must not obey a model's control characters; a file gets the answer as it is.
        write_text(piece if self._wrap is None else self._wrap.feed(printable(piece.replace("\r\n", "\n"))))

    def end_answer(self) -> None:
        write_text("\n" if self._wrap is None else self._wrap.end() + "\n")

    def say(self, text: str, *, is_error: bool = False) -> None:
        note(text, style="red" if is_error else "dim")


class KeyboardScreen(PipeScreen):
    """Reads what a person types, with line editing and a history.

    Args:
        history: The file that keeps what was typed; None to keep it in memory only.
    """

    interactive = True
    keys = "Alt-Enter begins a line without sending. Up, Down and Ctrl-R find earlier lines. Ctrl-C ends an answer."

    def __init__(self, history: Path | None = None) -> None:
        super().__init__()
        self._history = history
        self._prompt = _prompt_session([] if history is None else read_history(history))

    def read(self) -> str:
        line: str = self._prompt.prompt([("bold ansicyan", "> ")])
        if self._history is not None and line.strip():
            add_to_history(self._history, line)
        return line


def open_screen(*, history: bool = True) -> PipeScreen:
    """Open the screen that fits the standard input.

    Args:
        history: Whether to keep what is typed in a file.

    Returns:
        A `KeyboardScreen` on a terminal, else a `PipeScreen`.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        return PipeScreen()
    return KeyboardScreen(history_path() if history else None)


def history_path() -> Path:
    """Return the file of what was typed, in the folder that the system has for such a state."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "ismdata" / "chat_history"


def read_history(path: Path) -> list[str]:
    """Read the latest entries of a history, the oldest first; none where the file cannot be read.

    Args:
        path: The file: a JSON string a line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[-_REMEMBERED:]
    except (OSError, ValueError):
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, str)]


def add_to_history(path: Path, entry: str) -> None:
    """Add an entry to a history that only the user can read. Where that fails, the chat goes on without."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "a", encoding="utf-8") as file:
            path.chmod(0o600)  # a file that was there before may be open to others
            file.write(json.dumps(entry) + "\n")


def _prompt_session(history: list[str]) -> PromptSession[str]:
    """A prompt with line editing, on stderr if stdout is not a terminal."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    bindings = KeyBindings()

    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    bindings.add("escape", "enter")(begin_line)
    return PromptSession(
        history=InMemoryHistory(history),
        key_bindings=bindings,
        output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
        prompt_continuation="  ",
        enable_history_search=True,
    )
