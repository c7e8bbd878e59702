"""What a run exports: the model in Hugging Face's format, its tokenizer and its adapters.

The weights are safetensors, config.json has the mask as `ismdata_mask`, and the generation config stops at the chat
template's end of turn, where the model was trained to end an answer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ismdata.data import PackedDataset
from ismdata.rendering import ConversationEncoder

ADAPTER_NAME = "adapter"


def save_model(
    model: nn.Module,
    weights: dict[str, Tensor] | None,
    folder: Path,
    *,
    dataset: PackedDataset,
    tokenizer_files: Sequence[Path],
    base: str,
) -> None:
    """Write the trained model and its tokenizer. Adapters are merged into the model, and saved in `adapter/` too.

    Args:
        model: The trained model, with or without adapters.
        weights: The full weights, if the model has only its shard of them.
        folder: Where to write.
        dataset: The shards, whose index knows the special tokens.
        tokenizer_files: Files to copy.
        base: The name of the model that adapters belong to, without a path.

    Raises:
        OSError: if the disk refuses.
    """
    adapted: Any = model
    if not isinstance(model, PreTrainedModel):
        _save_adapter(adapted, folder / ADAPTER_NAME, base)
        adapted = adapted.merge_and_unload()
    set_generation_ends(adapted, dataset)
    try:
        adapted.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise OSError(str(error)) from error  # safetensors has no more specific error for a full disk
    mode = (folder / "config.json").stat().st_mode
    for path in (*folder.glob("*.safetensors"), *(folder / ADAPTER_NAME).glob("*.safetensors")):
        path.chmod(mode)  # safetensors lets only the owner read what it writes
    for file in tokenizer_files:
        shutil.copy2(file, folder / file.name)


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the adapters. peft adds a card without content, and writes where this machine keeps the base model."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def set_generation_ends(model: PreTrainedModel, dataset: PackedDataset) -> None:
    """Make `generate` stop at the end of a turn or of the text, and pad with the tokenizer's padding token."""
    index = dataset.shards.index
    ends = [*_end_of_turn(dataset), index["tokenizer"].get("eos_id")]
    config: Any = model.generation_config
    config.eos_token_id = list(dict.fromkeys(id for id in ends if id is not None)) or None
    config.pad_token_id = index["tokenizer"].get("pad_id")


def _end_of_turn(dataset: PackedDataset) -> list[int]:
    """The control tokens that end an answer; [] if the template ends it in plain text."""
    if "end_of_turn" not in dataset.shards.index.get("chat_template", {}):
        return []
    encoder = ConversationEncoder.load(dataset.shards.folder / "tokenizer")
    controls = set(encoder.encoding.tokenizer.control_ids.tolist())
    first = [*encoder.end_of_turn_ids[:1], *sorted(encoder.next_turn_end_ids)]
    return [id for id in first if id in controls]
