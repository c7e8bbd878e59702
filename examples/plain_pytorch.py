"""Train on packed shards in a plain PyTorch loop: python examples/plain_pytorch.py PACKED MODEL OUTPUT [STEPS]"""

from __future__ import annotations

import shutil
import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from ismdata import Collator, PackedDataset, attach


def main(packed: str, model_name: str, output: str, steps: int = 100) -> list[float]:
    dataset = PackedDataset(packed)
    model = attach(AutoModelForCausalLM.from_pretrained(model_name), mask=dataset.mask)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=Collator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    model.save_pretrained(output)
    shutil.copytree(f"{packed}/tokenizer", output, dirs_exist_ok=True)  # so that ismdata chat opens it
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
