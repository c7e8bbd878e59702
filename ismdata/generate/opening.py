"""Opening a session with any model: its tokenizer and template, its weights, its mask."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ismdata.attention import PRESETS, adapter_base, check_source, is_adapter, load
from ismdata.choices import MASKS
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError
from ismdata.generate.sampling import Sampling
from ismdata.generate.session import Session
from ismdata.generate.window import Window
from ismdata.rendering import SETTINGS_NAME, ConversationEncoder, load_encoding


def open_chat(
    model: str | Path,
    *,
    mask: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    window: Window | None = None,
    chat_template: str | None = None,
    reporter: Reporter = LOGGED,
) -> Session:
    """Open a session with a saved model: in bfloat16 on a GPU if there is one, else in float32 on the CPU.

    Args:
        model: A model folder, a folder of peft's adapters, a GGUF file or a hub name; with its tokenizer.
        mask: The mask to run the model under; None for the one in its config.
        system: The system prompt.
        max_new_tokens: Maximum number of tokens in an answer.
        sampling: How to choose tokens; by default the most likely one.
        window: The size of the context, and what happens when it is full.
        chat_template: A Jinja file or the name of a built-in template, for a tokenizer without one.
        reporter: Receives lines that name the template, if it is not the model's own, and the attention backend.

    Returns:
        The session.

    Raises:
        DataError: If there is no model with its tokenizer, or its config names an unknown mask.
        UsageError: If no mask is given and the config names none.
        UnsupportedModelError: If the mask cannot work inside the model.
    """
    name = str(model)
    if name in PRESETS and not Path(name).exists():
        load(name)  # says that it has no weights
    check_source(name)
    encoder = _open_encoder(name, chat_template, reporter)
    on_gpu = torch.cuda.is_available()
    loaded = load(
        name, mask=mask or _trained_mask(name), dtype=torch.bfloat16 if on_gpu else torch.float32, reporter=reporter
    )
    nn.Module.to(loaded, torch.device("cuda" if on_gpu else "cpu")).train(False)
    _check_vocabulary(name, loaded, encoder)
    return Session(
        loaded,
        encoder,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        window=window,
    )


def recorded_mask(model: str | Path) -> str | None:
    """Read the mask that the config of a model folder records.

    Args:
        model: The folder; for any other name there is nothing to read.

    Returns:
        The mask; None if the config cannot be read, or names no known mask.
    """
    folder = Path(model)
    try:
        config = json.loads(((_merged(folder) or folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("ismdata_mask") if isinstance(config, dict) else None
    return found if found in MASKS else None


def _trained_mask(name: str) -> str | None:
    """The mask for adapters in the folder of the model that has them merged, since their base records none."""
    return recorded_mask(name) if _merged(Path(name)) is not None else None


def _merged(folder: Path) -> Path | None:
    """The folder that `ismdata train` wrote around a folder of adapters; it has the tokenizer and the mask."""
    return folder.parent if is_adapter(folder) and (folder.parent / SETTINGS_NAME).is_file() else None


def _open_encoder(name: str, chat_template: str | None, reporter: Reporter) -> ConversationEncoder:
    """The encoder that `ismdata train` saved; for other models one from the tokenizer and its template."""
    folder = Path(name)
    if (folder / SETTINGS_NAME).is_file():
        if chat_template is not None:
            raise UsageError(
                f"--chat-template {chat_template}: {name} was trained with the template in its folder. Leave it out"
            )
        return ConversationEncoder.load(folder)
    if is_adapter(folder) and not (folder / "tokenizer.json").is_file():
        merged = _merged(folder)
        return _open_encoder(adapter_base(folder) if merged is None else str(merged), chat_template, reporter)
    if folder.is_dir() and (folder / "config.json").is_file() and not any(folder.glob("tokenizer*")):
        raise DataError(
            f"{name}: a model without a tokenizer. Copy the one that it was trained with into the folder, as in: cp "
            f"PACKED/tokenizer/* {name}/  (PACKED is the folder of its shards; or save_pretrained of its tokenizer)"
        )
    encoding = load_encoding(name, chat_template=chat_template)
    if chat_template is None and not encoding.tokenizer.pretrained.chat_template:
        reporter.note(
            f"{name} has no chat template: the built-in chatml is used. Name another one with --chat-template"
        )
    return ConversationEncoder(encoding)


def _check_vocabulary(name: str, model: PreTrainedModel, encoder: ConversationEncoder) -> None:
    """Raise UsageError if the tokenizer has ids that the model has no embeddings for."""
    embeddings = model.get_input_embeddings()
    size, tokens = getattr(embeddings, "num_embeddings", None), len(encoder.encoding.tokenizer.pretrained)
    if size is not None and tokens > size:
        raise UsageError(
            f"{name}: the model has {size} token embeddings; its tokenizer has {tokens} tokens. Save the tokenizer "
            "that it was trained with into its folder"
        )
