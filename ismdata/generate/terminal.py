"""A conversation line by line: read a question, stream the answer, run a few commands.

What reads and shows is a `Screen`, so that a terminal, a pipe and a test work alike.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Protocol

from ismdata.errors import DataError, IsmdataError, UsageError
from ismdata.generate.session import Session

#: The commands of the terminal, and what each does.
COMMANDS = {
    "/undo": "remove the last question and its answer",
    "/save FILE": "write the conversation to FILE, as a line that ismdata convert reads",
    "/load FILE": "continue the conversation in FILE",
    "/new": "begin a new conversation with the same system prompt",
    "/help": "show this list",
    "/exit": "leave; the end of input (Ctrl-D) leaves too",
}


class Screen(Protocol):
    """Where questions come from and where answers go."""

    @property
    def interactive(self) -> bool:
        """Whether a person types, and Ctrl-C means the answer and not the program."""

    @property
    def keys(self) -> str:
        """What `/help` says about keys; empty if there are none."""

    def read(self) -> str:
        """Read a question or a command. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""

    def answer(self, piece: str) -> None:
        """Show the next piece of an answer."""

    def end_answer(self) -> None:
        """End the answer's last line."""

    def say(self, text: str, *, is_error: bool = False) -> None:
        """Show a line that is not an answer."""


def run_terminal(session: Session, screen: Screen, *, trained: str | None = None) -> int:
    """Read lines and stream answers until `/exit` or the end of input. Ctrl-C ends an answer.

    Args:
        session: The session.
        screen: Reads and shows.
        trained: The mask that the model was trained under, if known; the greeting names it if the session's differs.

    Returns:
        The number of lines that ended in an error.

    Raises:
        DataError: If the input is not UTF-8.
        KeyboardInterrupt: For Ctrl-C, if no person types.
    """
    other = f" (the model was trained under {trained})" if trained not in (None, session.mask) else ""
    screen.say(f"Mask {session.mask}{other}. /help lists the commands, /exit leaves.")
    errors = 0
    while True:
        try:
            line = screen.read()
        except EOFError:
            return errors
        except KeyboardInterrupt:
            if not screen.interactive:
                raise
            screen.say("Ctrl-D or /exit leaves.")
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8 ({error.reason}); expected text") from error
        if line.strip() == "/exit":
            return errors
        try:
            if line.startswith("/"):
                _run_command(session, line.strip(), screen)
            elif line.strip():
                _stream(session, session.ask(line.strip()), screen)
        except IsmdataError as error:
            errors += 1
            screen.say(str(error), is_error=True)


def _run_command(session: Session, line: str, screen: Screen) -> None:
    """Run a command. Raises IsmdataError without a change of the session."""
    name, _, rest = line.partition(" ")
    known = {command.partition(" ")[0]: command for command in COMMANDS}
    if name not in known:
        raise UsageError(
            f"{name}: no such command; /help lists them. To send text that begins with /, type a space first"
        )
    if bool(rest.strip()) != (" " in known[name]):
        raise UsageError(f"{line}: expected {known[name]}")
    if name == "/help":
        for command, what in COMMANDS.items():
            screen.say(f"{command:<12} {what}")
        if screen.keys:
            screen.say(screen.keys)
    elif name == "/new":
        session.restart()
        screen.say("New conversation.")
    elif name == "/undo":
        undone = session.undo()
        screen.say(f"Removed {undone[0]['content']!r} and what followed." if undone else "Nothing to remove.")
    elif name == "/save":
        path = _parse_path(rest)
        session.save(path)
        screen.say(f"Wrote {len(session.messages)} messages to {path}.")
    elif name == "/load":
        path = _parse_path(rest)
        session.load(path)
        screen.say(f"Read {len(session.messages)} messages from {path}.")
        if session.messages[-1]["role"] != "assistant":
            _stream(session, session.answer(), screen)


def _parse_path(text: str) -> Path:
    """A file name as typed: quoted or not, with ~ for the home folder."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    return Path(words[0] if len(words) == 1 else text.strip()).expanduser()


def _stream(session: Session, answer: Generator[str, None, None], screen: Screen) -> None:
    """Show an answer as it comes, and how many messages were dropped for it."""
    before, messages, shown = session.left_out, len(session.messages), False
    try:
        with _caught_interrupts(screen) as pressed, closing(answer) as pieces:
            for piece in pieces:
                screen.answer(piece)
                shown = True
                if pressed:
                    break
    except BaseException as error:
        if shown:
            screen.end_answer()
        if not (isinstance(error, KeyboardInterrupt) and screen.interactive):
            raise
        if len(session.messages) == messages:
            screen.say("Stopped. The question is not part of the conversation.")
        return
    screen.end_answer()
    if session.left_out > before:
        screen.say(f"(The oldest {session.left_out} messages are no longer in the context.)")


@contextmanager
def _caught_interrupts(screen: Screen) -> Iterator[list[int]]:
    """A list that Ctrl-C fills: the answer ends after the token that is being computed.

    An exception could end a forward pass with a token in half of the layers. The second Ctrl-C raises one all the same,
    since a long prefill has no token to wait for; the session then feeds the conversation again.
    """
    pressed: list[int] = []
    if not screen.interactive or current_thread() is not main_thread():
        yield pressed
        return

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    former = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, former)
