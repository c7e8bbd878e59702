"""The same work with LLaMA-Factory: read JSON Lines, render, tokenize, pack so that documents do not see each other.

    python benchmarks/peers/llamafactory_prepare.py FILE --tokenizer FOLDER [--seq-len 8192] [--processes 2]

That is `get_dataset` with `packing` and `neat_packing`, which runs before its training; its own `chatml` template
renders. Prints one JSON object: seconds in this process, after imports and after the tokenizer is loaded, sequences,
tokens. LLaMA-Factory pins older releases of transformers and datasets than ismdata asks for, so it needs an environment
of its own.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

os.environ["DISABLE_VERSION_CHECK"] = "1"
for name in ("av", "torchaudio", "torchvision"):  # imported there, unused for text
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layout = {
            "file_name": str(arguments.source.resolve()),
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": TAGS,
        }
        Path(folder, "dataset_info.json").write_text(json.dumps({"corpus": layout}), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        data = DataArguments(
            template="chatml",
            dataset="corpus",
            dataset_dir=folder,
            cutoff_len=arguments.seq_len,
            packing=True,
            neat_packing=True,
            preprocessing_num_workers=arguments.processes,
            overwrite_cache=True,
        )
        model = ModelArguments(model_name_or_path=arguments.tokenizer, cache_dir=folder)
        training = TrainingArguments(output_dir=folder, do_train=True, report_to=[])
        template = get_template_and_fix_tokenizer(tokenizer, data)
        sys.stdout.flush()
        stdout, sys.stdout = sys.stdout, sys.stderr  # it prints its first record
        started = time.perf_counter()
        rows = get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)["train_dataset"]
        seconds = time.perf_counter() - started
        sys.stdout = stdout
        tokens = sum(sum(at > 0 for at in mask) for mask in rows["attention_mask"])
    print(json.dumps({"seconds": seconds, "sequences": len(rows), "tokens": tokens}))


if __name__ == "__main__":
    main()
