"""What a model is loaded from, as far as its files tell before they are opened."""

from __future__ import annotations

import json
from pathlib import Path

from ismdata.errors import DataError

#: The file that peft writes beside the weights of adapters.
ADAPTER_CONFIG_NAME = "adapter_config.json"


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are pickles only: loading a pickle can run any code.

    Args:
        folder: A model folder; one that does not exist is not refused.

    Raises:
        DataError: if it has pickles and no safetensors.
    """
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(kind))
    if pickles and not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{folder}: the weights are a pickle ({pickles[0]}), which can run any code when loaded; expected "
            "model.safetensors. If you trust it, load it with transformers and convert it with save_pretrained"
        )


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder has adapters and no model of its own.

    Args:
        folder: Any folder.

    Returns:
        Whether it is one of adapters.
    """
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def check_source(name: str) -> None:
    """Refuse what can be no model, and say what it is. A name that is nothing here may be one on the hub.

    Args:
        name: A model folder, a folder of peft's adapters, a GGUF file or a hub name.

    Raises:
        DataError: if it is something else, or the weights are pickles only.
    """
    path = Path(name)
    if path.suffix == ".gguf" and not path.is_file():
        raise DataError(f"{name}: no such file; expected a GGUF file")
    if path.is_file() and path.suffix != ".gguf":
        raise DataError(f"{name}: a file; expected a preset, a model folder, a .gguf file or a hub name")
    if path.is_dir() and not is_adapter(path):
        if not (path / "config.json").is_file():
            raise DataError(f"{name}: no config.json; {_what_it_is(path)}")
        refuse_pickles(path)


def _what_it_is(folder: Path) -> str:
    """What a folder without a model is, and what to name instead."""
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"it has {files[0].name}. Name the file: {files[0]}"
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        kind = str(index["format"]).partition("/")[0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = ""
    if kind == "ismdata.packed":
        return f"it is a packed folder. Train a model on it: ismdata train {folder} --model tiny -o model"
    if kind == "ismdata.conversations":
        return f"it is a converted folder. Pack it, then train: ismdata pack {folder} -o packed --tokenizer NAME"
    if (folder / "tokenizer.json").is_file():
        return "it is a tokenizer. Expected a model folder, as `ismdata train` or save_pretrained write it"
    return "expected a model folder, as `ismdata train` or save_pretrained write it"
