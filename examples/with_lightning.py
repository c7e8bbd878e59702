"""Train on packed shards with Lightning: python examples/with_lightning.py PACKED MODEL OUTPUT [STEPS]"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from ismdata import Collator, PackedDataset, attach


class ChatModel(lightning.LightningModule):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def main(packed: str, model_name: str, output: str, steps: int = 100) -> list[float]:
    dataset = PackedDataset(packed)
    chat = ChatModel(attach(AutoModelForCausalLM.from_pretrained(model_name), mask=dataset.mask))
    loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=Collator())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_steps=steps, max_epochs=-1, **quiet).fit(chat.train(), loader)
    chat.model.save_pretrained(output)
    shutil.copytree(f"{packed}/tokenizer", output, dirs_exist_ok=True)  # so that ismdata chat opens it
    return chat.losses


if __name__ == "__main__":
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
