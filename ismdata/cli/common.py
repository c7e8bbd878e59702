"""What the commands share: common options, exit codes for errors, printing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ismdata.display import draw, note, print_json
from ismdata.distributed import is_first_process
from ismdata.errors import IsmdataError, Terminated

Returned = TypeVar("Returned")

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write. It appears only when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
Workers = Annotated[int, typer.Option(help="Threads to use; 0: all cores. The output does not depend on it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def explained(command: Callable[..., Returned]) -> Callable[..., Returned]:
    """Wrap a command: an error that ismdata raises on purpose becomes one line on stderr and its exit code.

    Args:
        command: A command function.

    Returns:
        The function with the same signature.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Returned:
        _defer_pandas()
        try:
            return command(*args, **kwargs)
        except IsmdataError as error:
            note_once(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            note_once(str(interrupt) or "interrupted; no unfinished output is left")
            raise typer.Exit(130) from interrupt
        except Terminated as end:
            note_once(
                "terminated; run the same command again to resume"
                if end.kept
                else "terminated; no unfinished output is left"
            )
            raise typer.Exit(143) from end

    return wrapped


class _NoPandas:
    """Finds no pandas."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _defer_pandas() -> None:
    """Keep pyarrow from importing pandas until it is used, which saves 0.1 s at the start of a command.

    pyarrow asks whether the first argument of `pa.array` is an object of pandas, and imports pandas for that. It asks
    only once, so it gets the answer here. Conversions from and to pandas still import it.
    """
    import pyarrow as pa

    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(finder)


def note_once(text: str) -> None:
    """Print a line, in the first of several processes only: all of them end for the same reason.

    Args:
        text: The line.
    """
    if is_first_process():
        note(text)


def show(shown: Any, *, as_json: bool) -> None:
    """Print a view, in the first of several processes only.

    Args:
        shown: A `View`.
        as_json: Print its facts as one JSON object on stdout, instead of the drawing.
    """
    if not is_first_process():
        return
    if as_json:
        print_json(shown.as_json())
    else:
        draw(shown, whole_lines=getattr(shown, "whole_lines", False))
