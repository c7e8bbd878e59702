"""What a run exports: the model in Hugging Face's format, its tokenizer and its model card.

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

from ismdata import __version__
from ismdata.data import PackedDataset
from ismdata.rendering import ConversationEncoder
from ismdata.train.metrics import CURVES_NAME
from ismdata.train.options import TrainOptions

ADAPTER_NAME = "adapter"
CARD_NAME = "README.md"


def save_model(
    model: nn.Module,
    weights: dict[str, Tensor] | None,
    folder: Path,
    *,
    dataset: PackedDataset,
    tokenizer_files: Sequence[Path],
) -> None:
    """Write the trained model and its tokenizer. Adapters are merged into the model, and saved in `adapter/` too.

    Args:
        model: The trained model, with or without adapters.
        weights: The full weights, if the model has only its shard of them.
        folder: Where to write.
        dataset: The shards, whose index knows the special tokens.
        tokenizer_files: Files to copy.

    Raises:
        OSError: if the disk refuses.
    """
    adapted: Any = model
    if not isinstance(model, PreTrainedModel):
        adapted.save_pretrained(folder / ADAPTER_NAME)
        adapted = adapted.merge_and_unload()
    set_generation_ends(adapted, dataset)
    try:
        adapted.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise OSError(str(error)) from error  # safetensors has no more specific error for a full disk
    for file in tokenizer_files:
        shutil.copy2(file, folder / file.name)


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


def write_card(
    folder: Path,
    *,
    options: TrainOptions,
    dataset: PackedDataset,
    mask: str,
    global_batch: int,
    facts: dict[str, Any],
) -> None:
    """Write README.md, the model card.

    Args:
        folder: Where to write.
        options: The run's options.
        dataset: The shards.
        mask: The mask that the model was trained under.
        global_batch: Sequences per step.
        facts: Rows of the card's table, title to value.
    """
    index = dataset.shards.index
    totals = index.get("totals", {})
    counts = ", ".join(f"{totals[name]:,} {name.replace('_', ' ')}" for name in _COUNTED if name in totals)
    template = index.get("chat_template", {}).get("name", "unknown")
    shown = {name: value for name, value in options.as_dict().items() if value not in (None, False, (), {})}
    shown |= {"global_batch": global_batch, "mask": mask}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    unused = {"epochs"} if options.steps is not None else set()
    unused |= set() if options.lora else {"lora_rank", "lora_alpha"}
    sharding = shown.pop("fsdp_config", {})
    given = "\n".join(f"{name} = {_toml(value)}" for name, value in sorted(shown.items()) if name not in unused)
    if sharding:
        given += "\n\n[fsdp_config]\n" + "\n".join(
            f"{name} = {_toml(value)}" for name, value in sorted(sharding.items())
        )
    curves = f"\n![Loss, gradient norm and learning rate]({CURVES_NAME})\n" if (folder / CURVES_NAME).exists() else ""
    (folder / CARD_NAME).write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ismdata, {mask}]
---

# {options.model}, trained with ismdata

Trained under the attention mask `{mask}` with ismdata {__version__}. **Load it through ismdata** (`ismdata chat`, or
`ismdata.attention.load`): other programs ignore the mask in `config.json` and run the model under the causal one.

| | |
|---|---|
{rows}
{curves}
## Data

{counts or "Unknown totals"}, in sequences of {dataset.seq_len:,} tokens. The tokenizer,
`{index["tokenizer"].get("name", "unknown")}`, is in this folder with the chat template, `{template}`. SHA-256 of the
shards' index: `{index["sha256"]}`.

## Options

A `--config` file for the same run; `run.json` records what its result depends on.

```toml
{given}
```
""",
        encoding="utf-8",
    )


_COUNTED = ("conversations", "documents", "sequences", "tokens", "target_tokens")


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
