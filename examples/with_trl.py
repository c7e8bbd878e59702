"""Train on packed shards with TRL's SFTTrainer: python examples/with_trl.py PACKED MODEL OUTPUT [STEPS]

The shards have tokens, targets and positions already, so the trainer must prepare nothing and keep all columns. It
accepts Hugging Face datasets only, so it gets a dataset of row numbers, and the collator reads the rows.
"""

from __future__ import annotations

import shutil
import sys

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ismdata import Collator, PackedDataset, attach


def main(packed: str, model_name: str, output: str, steps: int = 100) -> list[float]:
    dataset = PackedDataset(packed)
    model = attach(AutoModelForCausalLM.from_pretrained(model_name), mask=dataset.mask)
    collator = Collator()

    def batch_of(rows: list[dict[str, int]]) -> dict[str, Tensor]:
        return collator([dataset[row["row"]] for row in rows])

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{output}/checkpoints",
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"row": range(len(dataset))}),
        data_collator=batch_of,
        processing_class=AutoTokenizer.from_pretrained(f"{packed}/tokenizer"),
    )
    trainer.train()
    model.save_pretrained(output)
    shutil.copytree(f"{packed}/tokenizer", output, dirs_exist_ok=True)  # so that ismdata chat opens it
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
