"""The same work with TRL: load JSON Lines, render and tokenize with the assistant's mask, pack best-fit decreasing.

    python benchmarks/peers/trl_prepare.py FILE --tokenizer FOLDER --chat-template FILE [--seq-len 8192] [--processes 2]

That is what `trl.SFTTrainer` does before its first step. Prints one JSON object: seconds in this process, after imports
and after the tokenizer is loaded, sequences, tokens. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer
from trl.data_utils import pack_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--chat-template", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.chat_template = arguments.chat_template.read_text(encoding="utf-8")

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        rows = load_dataset("json", data_files=arguments.source, split="train", cache_dir=cache)
        rows = rows.map(tokenize, remove_columns=rows.column_names, num_proc=arguments.processes)
        packed = pack_dataset(rows, arguments.seq_len, "bfd")
        seconds = time.perf_counter() - started
        tokens = sum(len(ids) for ids in packed["input_ids"])
    print(json.dumps({"seconds": seconds, "sequences": len(packed), "tokens": tokens}))


if __name__ == "__main__":
    main()
