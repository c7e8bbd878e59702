"""What the commands share: options that several have, errors to exit codes, printing."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ismdata.display import note
from ismdata.distributed import is_first_process
from ismdata.errors import IsmdataError, Terminated

Returned = TypeVar("Returned")

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write. It appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
Workers = Annotated[int, typer.Option(help="Threads to use, 0 for all cores. The output does not depend on it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def explained(command: Callable[..., Returned]) -> Callable[..., Returned]:
    """Turn errors that ismdata raises on purpose into one line on stderr and their exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Returned:
        try:
            return command(*args, **kwargs)
        except IsmdataError as error:
            _say_once(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            _say_once(str(interrupt) or "interrupted: nothing half-written is left")
            raise typer.Exit(130) from interrupt
        except Terminated as end:
            _say_once("terminated: run the same command again to go on" if end.kept else "terminated: nothing is left")
            raise typer.Exit(143) from end

    return wrapped


def _say_once(text: str) -> None:
    """A line, from the first of several processes alone: all of them end for the same reason."""
    if is_first_process():
        note(text)


def show(shown: Any, *, as_json: bool) -> None:
    """Print a view: as one JSON object, or rendered for the terminal. Of several processes the first one prints."""
    if not is_first_process():
        return
    if as_json:
        json.dump(shown.as_json(), sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        from rich.console import Console

        # Where there is no terminal there is no width to fit: names and paths stay whole.
        Console(width=None if sys.stdout.isatty() else 160).print(shown)
