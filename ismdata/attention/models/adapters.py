"""Folders of peft's adapters: the base model is loaded and they are merged into it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from ismdata.attention.models.source import ADAPTER_CONFIG_NAME, refuse_pickles
from ismdata.errors import DataError, UnsupportedModelError


def adapter_base(folder: Path) -> str:
    """Read the name of the model that adapters belong to.

    Args:
        folder: The folder of the adapters.

    Returns:
        A model folder, a GGUF file or a hub name.

    Raises:
        DataError: if the folder names none, or a folder that does not exist.
    """
    place = folder / ADAPTER_CONFIG_NAME
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{place}: cannot be read ({error}); expected the configuration that peft writes") from error
    if isinstance(base, str) and base and (Path(base).exists() or not _looks_local(base)):
        return base
    merged = folder.parent
    instead = f"{merged} is the model with these adapters merged: name it, or write" if _is_model(merged) else "Write"
    raise DataError(
        f"{place}: base_model_name_or_path is {base!r}, which is no model here; expected a folder, a GGUF file or a "
        f"hub name. {instead} the base model's path there"
    )


def merge_adapter(folder: Path, load: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Load the base model of adapters and merge them into its weights.

    Args:
        folder: The folder of the adapters.
        load: Loads the base model, given its name.

    Returns:
        The model.

    Raises:
        DataError: if peft is not installed, or the base model or the adapters cannot be loaded.
        UnsupportedModelError: if they are virtual tokens, which cannot be merged.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise DataError(
            f"{folder}: adapters require peft ({error}). Install it: pip install 'ismdata[lora]'"
        ) from error
    base = adapter_base(folder)
    refuse_pickles(folder)
    model = load(base)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"{folder}: {config.peft_type.value} of peft puts virtual tokens before a row, which the mask does not "
                "count. Train adapters of weights instead (LoRA, IA3, …)"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")  # peft would leave those weights as they are
            warnings.filterwarnings("ignore", category=FutureWarning)  # about names that peft reads from transformers
            merged: PreTrainedModel = PeftModel.from_pretrained(model, str(folder), config=config).merge_and_unload()
    except UnsupportedModelError:
        raise
    except Exception as error:  # for a broken file the libraries raise anything, from KeyError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not adapters of {base} ({first}). Train them again, or name their base") from error
    return merged


def _looks_local(name: str) -> bool:
    """Whether a name can only be a path: no hub name has more than one slash or begins so."""
    return name.startswith((".", "~", "/", "\\")) or name.count("/") > 1 or name.endswith(".gguf")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()
