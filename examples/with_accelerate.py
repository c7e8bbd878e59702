"""Train on any number of devices: accelerate launch examples/with_accelerate.py PACKED MODEL OUTPUT [STEPS]

The loss of a step is the mean over the targets of all processes. Each process divides the sum over its own targets by
their total, and multiplies by the number of processes, over which accelerate averages the gradients.
"""

from __future__ import annotations

import shutil
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from ismdata import Collator, PackedDataset, attach


def main(packed: str, model_name: str, output: str, steps: int = 100) -> list[float]:
    accelerator = Accelerator()
    dataset = PackedDataset(packed)
    model = attach(AutoModelForCausalLM.from_pretrained(model_name), mask=dataset.mask)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=Collator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            targets = accelerator.reduce((batch["labels"][:, 1:] != -100).sum(), "sum")
            loss = model(**batch, num_items_in_batch=targets).loss
            accelerator.backward(loss * accelerator.num_processes)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "sum")))
            if len(losses) == steps:
                break
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output)
        shutil.copytree(f"{packed}/tokenizer", output, dirs_exist_ok=True)  # so that ismdata chat opens it
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
