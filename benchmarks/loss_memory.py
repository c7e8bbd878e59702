"""Peak memory of one training step with a vocabulary of 151,936, with all logits and with the loss at the targets.

    python benchmarks/loss_memory.py [--seq-len 4096] [--targets 0.5] [--way all|targets]

One layer, 64 wide, so that nearly all memory is the loss's; float32 on CPU. Half of the tokens are targets. Each way
runs in a process of its own; what the process had before the step is subtracted. Prints one JSON object a way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ismdata.attention.attachment import attach
from ismdata.train.loss import compute_loss_at_targets

VOCABULARY = 151_936


def resident(which: str) -> float:
    """GiB that this process has resident (VmRSS), or had at most (VmHWM) since `forget_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(which))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(way: str, seq_len: int, share: float) -> dict[str, object]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
    )
    model = attach(LlamaForCausalLM(config)).train()
    if way == "targets" and not compute_loss_at_targets(model):
        raise SystemExit("the head could not be parted from the loss")
    tokens = torch.randint(VOCABULARY, (1, seq_len))
    row = torch.arange(seq_len, dtype=torch.int32)[None]
    labels = tokens.masked_fill(torch.rand(1, seq_len) >= share, -100)
    forget_peak()
    before = resident("VmRSS")
    started = time.monotonic()
    loss = model(input_ids=tokens, labels=labels, doc_start=torch.zeros_like(row), kv_end=row + 1).loss
    loss.backward()
    return {
        "way": way,
        "seq_len": seq_len,
        "targets": int((labels != -100).sum()),
        "loss": round(loss.item(), 5),
        "peak_GiB": round(resident("VmHWM") - before, 2),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--targets", type=float, default=0.5, help="share of the tokens that are targets")
    parser.add_argument("--way", choices=["all", "targets"], help="default: both, one after the other")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.seq_len, options.targets)))
        return
    for way in ("all", "targets"):
        subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)


if __name__ == "__main__":
    main()
