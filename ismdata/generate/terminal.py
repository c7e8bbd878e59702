"""A session in the terminal: a line in, the answer out as it comes, and a few commands."""

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

from ismdata import masks
from ismdata.attention import model_folder
from ismdata.errors import DataError, IsmdataError, UsageError
from ismdata.generate.sampling import Sampling
from ismdata.generate.session import Session, Window
from ismdata.rendering import SETTINGS_NAME, ConversationEncoder, load_encoding

#: What a line that begins with / may say, and what it does.
COMMANDS = {
    "/undo": "take back the last question and its answer",
    "/save FILE": "write the conversation to FILE, one line that ismdata convert reads",
    "/load FILE": "go on with the conversation in FILE",
    "/new": "start a new conversation; the system prompt stays",
    "/help": "show this list",
    "/exit": "leave; so does the end of input (Ctrl-D)",
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
    """A session with the model in `folder`, on a GPU in bfloat16 where there is one, else on the CPU in float32.

    Raises DataError when the folder is no saved model with its tokenizer, or its config names a mask that there is not;
    UsageError when no mask is known.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = _encoder(folder)
    recorded_mask(folder, override=mask)
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
    """As `ismdata train` saved it; for a model from elsewhere with its tokenizer's own template."""
    if (folder / SETTINGS_NAME).is_file() or not (folder / "tokenizer.json").is_file():
        return ConversationEncoder.load(folder)
    return ConversationEncoder(load_encoding(str(folder)))


def recorded_mask(folder: Path, *, override: str | None = None) -> str | None:
    """The mask that the config of the model in `folder` records; None for none, or no config that can be read.

    Raises DataError for one that there is not, unless `override` takes its place.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading the model says what is wrong
    found = config.get("ismdata_mask") if isinstance(config, dict) else None
    if found is None or found in masks.MASKS:
        return found
    if override is None:
        raise DataError(
            f"{folder / 'config.json'}: ismdata_mask is {found!r}; expected one of {', '.join(masks.MASKS)}. Name the "
            "mask that the model was trained under with --mask, or install a newer ismdata"
        )
    return None


def run_terminal(
    session: Session,
    *,
    trained: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Read a line, stream the answer, until `/exit` or the end of input. Ctrl-C ends an answer.

    trained: the mask that the model's config records; a word is said where the session's is another.
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
                _command(session, line.strip(), write)
            elif line.strip():
                _show(session, session.ask(line.strip()), write)
        except IsmdataError as error:
            write(f"{error}\n")


def _command(session: Session, line: str, write: Callable[[str], None]) -> None:
    """Do what a line that begins with / says. Raises IsmdataError, with the session as it was."""
    name, _, rest = line.partition(" ")
    known = {command.partition(" ")[0]: command for command in COMMANDS}
    if name not in known:
        raise UsageError(f"{name}: no such command; /help lists them. A line of text may begin with a blank")
    if bool(rest.strip()) != (" " in known[name]):
        raise UsageError(f"{line}: expected {known[name]}")
    if name == "/help":
        write("".join(f"{command:<12} {what}\n" for command, what in COMMANDS.items()))
    elif name == "/new":
        session.restart()
        write("A new conversation.\n")
    elif name == "/undo":
        undone = session.undo()
        what = f"Took back {undone[0]['content']!r} and what followed." if undone else "Nothing to take back."
        write(f"{what}\n")
    elif name == "/save":
        path = _path(rest)
        session.save(path)
        write(f"Wrote {len(session.messages)} messages to {path}.\n")
    elif name == "/load":
        path = _path(rest)
        session.load(path)
        write(f"Read {len(session.messages)} messages from {path}.\n")
        if session.messages[-1]["role"] != "assistant":
            _show(session, session.answer(), write)


def _path(text: str) -> Path:
    """A file's name as it was typed: quoted or not, ~ for the home folder."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    return Path(words[0] if len(words) == 1 else text.strip()).expanduser()


def _show(session: Session, answer: Generator[str, None, None], write: Callable[[str], None]) -> None:
    before = session.left_out
    with _interrupts() as interrupted, closing(answer) as pieces:
        for piece in pieces:
            write(piece)
            if interrupted.is_set():
                break
        write("\n")
    if session.left_out > before:
        write(f"(The oldest {session.left_out} messages have left the context.)\n")


@contextmanager
def _interrupts() -> Iterator[Event]:
    """An event that Ctrl-C sets, instead of breaking into the model and leaving a token in half of its layers."""
    interrupted = Event()
    if current_thread() is not main_thread():
        yield interrupted
        return
    former = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, former)
