"""What to type after a command was given the wrong folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Literal

from ismdata.suggestions import near

Kind = Literal["nothing", "file", "packed", "conversations", "model", "tokenizer", "folder"]

#: What was found -> what to do where a converted folder was wanted, and where a packed one was. `{0}` is its path.
_STEPS: dict[Kind, tuple[str, str]] = {
    "nothing": ("Make one: ismdata convert FILE -o {0}", "Make one: ismdata pack converted -o {0} --tokenizer NAME"),
    "file": ("Convert it first: ismdata convert {0} -o converted",) * 2,
    "packed": ("It is packed already. Train on it: ismdata train {0} --model tiny -o model", ""),
    "conversations": ("", "Pack it first: ismdata pack {0} -o packed --tokenizer NAME"),
    "model": ("It is a model. Talk with it: ismdata chat {0}",) * 2,
    "tokenizer": ("It is a tokenizer. Pack with it: ismdata pack converted -o packed --tokenizer {0}",) * 2,
    "folder": ("Convert it first: ismdata convert {0} -o converted",) * 2,
}


def kind_of(path: Path) -> Kind:
    """What a path is to ismdata.

    Args:
        path: Any path.

    Returns:
        Its kind, by the files it has; `folder` if it is none of ours.
    """
    if not path.is_dir():
        return "file" if path.exists() else "nothing"
    try:
        found = str(json.loads((path / "index.json").read_text(encoding="utf-8"))["format"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = ""
    if found.startswith("ismdata.packed"):
        return "packed"
    if found.startswith("ismdata.conversations"):
        return "conversations"
    if (path / "config.json").is_file():
        return "model"
    return "tokenizer" if (path / "tokenizer.json").is_file() else "folder"


def next_step(path: Path, *, packed: bool) -> str:
    """A sentence that ends a message about the wrong folder.

    Args:
        path: What was given.
        packed: Whether a packed folder was expected; otherwise a converted one.

    Returns:
        What it is or may have meant, and the command to type, after a space; empty if there is nothing to say.
    """
    kind = kind_of(path)
    if kind == "nothing" and path.parent.is_dir() and (meant := near(str(path), map(str, path.parent.iterdir()))):
        return f" Did you mean {meant}?"
    step = _STEPS[kind][packed].format(shlex.quote(str(path)))
    return f" {step}" if step else ""
