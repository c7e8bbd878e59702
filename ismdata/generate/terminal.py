"""A session in the terminal: read a line, stream the answer, run a few commands."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread

import torch
from torch import nn
from transformers.utils import logging

from ismdata.attention import model_folder
from ismdata.choices import MASKS
from ismdata.errors import DataError, IsmdataError, UsageError
from ismdata.generate.sampling import Sampling
from ismdata.generate.session import Session
from ismdata.generate.window import Window
from ismdata.rendering import SETTINGS_NAME, ConversationEncoder, load_encoding

#: The commands of the terminal, and what each does.
COMMANDS = {
    "/undo": "remove the last question and its answer",
    "/save FILE": "write the conversation to FILE, as a line that ismdata convert reads",
    "/load FILE": "continue the conversation in FILE",
    "/new": "begin a new conversation with the same system prompt",
    "/help": "show this list",
    "/exit": "leave; the end of input (Ctrl-D) leaves too",
}


def open_chat(
    folder: Path,
    *,
    mask: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    window: Window | None = None,
) -> Session:
    """Open a session with a saved model: in bfloat16 on a GPU if there is one, else in float32 on the CPU.

    Args:
        folder: A folder with a model and its tokenizer.
        mask: The mask to run the model under; None for the one in its config.
        system: The system prompt.
        max_new_tokens: Maximum number of tokens in an answer.
        sampling: How to choose tokens; by default the most likely one.
        window: The size of the context, and what happens when it is full.

    Returns:
        The session.

    Raises:
        DataError: If the folder is not a model with its tokenizer, or its config names an unknown mask.
        UsageError: If no mask is given and the config names none.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = _encoder(folder)
    on_gpu = torch.cuda.is_available()
    model = model_folder.load(folder, mask=mask, dtype=torch.bfloat16 if on_gpu else torch.float32)
    nn.Module.to(model, torch.device("cuda" if on_gpu else "cpu")).train(False)
    return Session(
        model,
        encoder,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        window=window,
    )


def _encoder(folder: Path) -> ConversationEncoder:
    """The encoder that `ismdata train` saved; for other models one from the tokenizer and its template."""
    if (folder / SETTINGS_NAME).is_file() or not (folder / "tokenizer.json").is_file():
        return ConversationEncoder.load(folder)
    return ConversationEncoder(load_encoding(str(folder)))


def recorded_mask(folder: Path) -> str | None:
    """Read the mask that a model's config records.

    Args:
        folder: The folder of the model.

    Returns:
        The mask; None if the config cannot be read, or names no known mask.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("ismdata_mask") if isinstance(config, dict) else None
    return found if found in MASKS else None


def run_terminal(
    session: Session,
    *,
    trained: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Read lines and stream answers until `/exit` or the end of input. Ctrl-C ends an answer.

    Args:
        session: The session.
        trained: The mask that the model was trained under, if known; the greeting names it if the session's differs.
        read: Reads a line, given the prompt.
        write: Writes text.

    Raises:
        DataError: If the input is not UTF-8.
    """
    other = f" (the model was trained under {trained})" if trained not in (None, session.mask) else ""
    write(f"Mask {session.mask}{other}. /help lists the commands, /exit leaves.\n")
    while True:
        try:
            line = read("> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8 ({error.reason}); expected text") from error
        if line.strip() == "/exit":
            return
        try:
            if line.startswith("/"):
                _run_command(session, line.strip(), write)
            elif line.strip():
                _stream(session, session.ask(line.strip()), write)
        except IsmdataError as error:
            write(f"{error}\n")


def _run_command(session: Session, line: str, write: Callable[[str], None]) -> None:
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
        write("".join(f"{command:<12} {what}\n" for command, what in COMMANDS.items()))
    elif name == "/new":
        session.restart()
        write("New conversation.\n")
    elif name == "/undo":
        undone = session.undo()
        result = f"Removed {undone[0]['content']!r} and what followed." if undone else "Nothing to remove."
        write(f"{result}\n")
    elif name == "/save":
        path = _parse_path(rest)
        session.save(path)
        write(f"Wrote {len(session.messages)} messages to {path}.\n")
    elif name == "/load":
        path = _parse_path(rest)
        session.load(path)
        write(f"Read {len(session.messages)} messages from {path}.\n")
        if session.messages[-1]["role"] != "assistant":
            _stream(session, session.answer(), write)


def _parse_path(text: str) -> Path:
    """A file name as typed: quoted or not, with ~ for the home folder."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    return Path(words[0] if len(words) == 1 else text.strip()).expanduser()


def _stream(session: Session, answer: Generator[str, None, None], write: Callable[[str], None]) -> None:
    """Write an answer as it comes, and how many messages were dropped for it."""
    before = session.left_out
    with _caught_interrupts() as interrupted, closing(answer) as pieces:
        for piece in pieces:
            write(piece)
            if interrupted.is_set():
                break
        write("\n")
    if session.left_out > before:
        write(f"(The oldest {session.left_out} messages are no longer in the context.)\n")


@contextmanager
def _caught_interrupts() -> Iterator[Event]:
    """An event that Ctrl-C sets. An exception could instead end a forward pass with a token in half of the layers."""
    interrupted = Event()
    if current_thread() is not main_thread():
        yield interrupted
        return
    former = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, former)
