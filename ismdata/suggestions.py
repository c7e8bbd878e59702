"""What someone may have meant: near names, and the names that options have in other trainers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Options of other trainers, in their spelling -> what it is here, and where it comes from. What it is here is
#: `COMMAND --OPTION` or `COMMAND ARGUMENT`, or else a sentence. Sources: the configuration classes of TRL
#: (`SFTConfig`, `ModelConfig`, `ScriptArguments`, and `TrainingArguments` of transformers below them), the config
#: reference of Axolotl, the argument classes of LLaMA-Factory (`src/llamafactory/hparams`), `FastLanguageModel` of
#: Unsloth, and the recipe configs of torchtune.
FOREIGN_NAMES: dict[str, tuple[str, str]] = {
    # ---- how long and how fast ----
    "max_steps": ("train --steps", "TRL, Axolotl, LLaMA-Factory"),
    "max_steps_per_epoch": ("train --steps", "torchtune"),
    "num_train_epochs": ("train --epochs", "TRL, LLaMA-Factory"),
    "num_epochs": ("train --epochs", "Axolotl"),
    "lr": ("train --learning-rate", "torchtune"),
    "lr_scheduler_type": ("train --schedule", "TRL, LLaMA-Factory"),
    "lr_scheduler": ("train --schedule", "Axolotl, torchtune"),
    "warmup_steps": ("train --warmup", "TRL, Axolotl, LLaMA-Factory"),
    "num_warmup_steps": ("train --warmup", "torchtune"),
    "warmup_ratio": ("train --warmup", "TRL, Axolotl, LLaMA-Factory"),
    "clip_grad_norm": ("train --max-grad-norm", "torchtune"),
    # ---- batches ----
    "per_device_train_batch_size": ("train --batch-size", "TRL, LLaMA-Factory"),
    "micro_batch_size": ("train --batch-size", "Axolotl"),
    "train_batch_size": ("train --batch-size", "DeepSpeed"),
    "per_device_eval_batch_size": ("train --batch-size", "TRL, LLaMA-Factory"),
    "eval_batch_size": ("train --batch-size", "Axolotl"),
    "gradient_accumulation_steps": ("train --accumulation", "TRL, Axolotl, LLaMA-Factory, torchtune"),
    "global_batch_size": ("train --global-batch", "Megatron-LM"),
    # ---- sequences and what is trained ----
    "max_length": ("pack --seq-len", "TRL"),
    "max_seq_length": ("pack --seq-len", "TRL, Unsloth"),
    "max_seq_len": ("pack --seq-len", "torchtune"),
    "sequence_len": ("pack --seq-len", "Axolotl"),
    "cutoff_len": ("pack --seq-len", "LLaMA-Factory"),
    "model_max_length": ("pack --seq-len", "FastChat"),
    "packing": ("`ismdata pack` always packs", "TRL, LLaMA-Factory"),
    "sample_packing": ("`ismdata pack` always packs", "Axolotl"),
    "neat_packing": ("`ismdata pack` always packs, and no document sees another", "LLaMA-Factory"),
    "packed": ("`ismdata pack` always packs", "torchtune"),
    "eval_packing": ("`ismdata pack` always packs", "TRL"),
    "pad_to_sequence_len": ("`ismdata pack` fills sequences, so that hardly any padding is left", "Axolotl"),
    "train_on_inputs": ("only answers are trained; `ismdata pack --train-on` says which", "Axolotl"),
    "train_on_input": ("only answers are trained; `ismdata pack --train-on` says which", "torchtune"),
    "train_on_prompt": ("only answers are trained; `ismdata pack --train-on` says which", "LLaMA-Factory"),
    "mask_history": ("pack --train-on", "LLaMA-Factory"),
    "roles_to_train": ("only answers are trained; `ismdata pack --train-on` says which", "Axolotl"),
    "train_on_eos": ("the end of an answer is trained where the template writes one", "Axolotl"),
    "assistant_only_loss": ("only answers are trained", "TRL"),
    "completion_only_loss": ("only answers are trained", "TRL"),
    "train_on_responses_only": ("only answers are trained", "Unsloth"),
    "template": ("pack --chat-template", "LLaMA-Factory"),
    "chat_template_path": ("pack --chat-template", "TRL"),
    "enable_thinking": ("pack --template-arg", "LLaMA-Factory"),
    # ---- the model ----
    "model_name_or_path": ("train --model", "TRL, LLaMA-Factory"),
    "model_name": ("train --model", "Unsloth"),
    "base_model": ("train --model", "Axolotl"),
    "checkpoint_dir": ("train --model", "torchtune"),
    "tokenizer_name_or_path": ("pack --tokenizer", "TRL"),
    "tokenizer_config": ("pack --tokenizer", "Axolotl"),
    "trust_remote_code": ("code from the hub is never run; the family must be one of transformers", "TRL"),
    "attn_implementation": ("train --backend", "TRL"),
    "flash_attn": ("train --backend", "LLaMA-Factory"),
    "flash_attention": ("train --backend", "Axolotl"),
    "torch_dtype": ("train --precision", "TRL"),
    "dtype": ("train --precision", "TRL, Unsloth, torchtune"),
    "bf16": ("train --precision", "TRL, Axolotl, LLaMA-Factory"),
    "fp16": ("train --precision", "TRL, Axolotl, LLaMA-Factory"),
    "pure_bf16": ("train --precision", "LLaMA-Factory"),
    "load_in_4bit": ("weights are not quantized for training", "TRL, Axolotl, Unsloth"),
    "load_in_8bit": ("weights are not quantized for training", "TRL, Axolotl, Unsloth"),
    "quantization_bit": ("weights are not quantized for training", "LLaMA-Factory"),
    # ---- adapters ----
    "use_peft": ("train --lora", "TRL"),
    "use_lora": ("train --lora", "FastChat"),
    "adapter": ("train --lora", "Axolotl"),
    "finetuning_type": ("train --lora", "LLaMA-Factory"),
    "lora_r": ("train --lora-rank", "TRL, Axolotl"),
    "lora_dropout": ("adapters have no dropout", "TRL, Axolotl, LLaMA-Factory, Unsloth"),
    "lora_target": ("adapters are put on all linear layers", "LLaMA-Factory"),
    "lora_target_modules": ("adapters are put on all linear layers", "TRL, Axolotl"),
    "target_modules": ("adapters are put on all linear layers", "Unsloth"),
    # ---- data ----
    "dataset": ("train PACKED", "LLaMA-Factory, torchtune"),
    "datasets": ("train PACKED", "Axolotl"),
    "dataset_name": ("convert SOURCES", "TRL"),
    "dataset_dir": ("convert SOURCES", "LLaMA-Factory"),
    "data_path": ("convert SOURCES", "FastChat"),
    "train_file": ("convert SOURCES", "transformers"),
    "dataset_prepared_path": ("pack --output", "Axolotl"),
    "eval_dataset": ("train --eval", "LLaMA-Factory"),
    "validation_file": ("train --eval", "transformers"),
    "val_size": ("convert --split", "LLaMA-Factory"),
    "val_set_size": ("convert --split", "Axolotl"),
    "test_split_size": ("convert --split", "TRL"),
    "max_samples": ("convert --sample", "LLaMA-Factory"),
    "preprocessing_num_workers": ("pack --workers", "LLaMA-Factory"),
    "dataset_num_proc": ("pack --workers", "TRL"),
    "dataset_processes": ("pack --workers", "Axolotl"),
    "dataloader_num_workers": ("train --workers", "TRL, LLaMA-Factory"),
    # ---- memory and speed ----
    "use_gradient_checkpointing": ("train --gradient-checkpointing", "Unsloth"),
    "enable_activation_checkpointing": ("train --gradient-checkpointing", "torchtune"),
    "torch_compile": ("train --compile", "TRL, Axolotl"),
    "deepspeed": ("train --fsdp", "TRL, Axolotl, LLaMA-Factory"),
    "fsdp_config": ("train --fsdp", "TRL, Axolotl"),
    "use_liger_kernel": ("the loss is computed in chunks, without the logits of a whole batch", "TRL"),
    "optim": ("the optimizer is AdamW", "TRL, LLaMA-Factory"),
    "optimizer": ("the optimizer is AdamW", "Axolotl, torchtune"),
    # ---- what is written ----
    "output_dir": ("train --output", "TRL, Axolotl, LLaMA-Factory, torchtune"),
    "overwrite_output_dir": ("train --overwrite", "TRL, LLaMA-Factory"),
    "overwrite_cache": ("pack --overwrite", "LLaMA-Factory"),
    "logging_steps": ("train --log-every", "TRL, Axolotl, LLaMA-Factory"),
    "log_every_n_steps": ("train --log-every", "torchtune"),
    "save_steps": ("train --save-every", "TRL, Axolotl, LLaMA-Factory"),
    "saves_per_epoch": ("train --save-every", "Axolotl"),
    "save_total_limit": ("train --keep", "TRL, Axolotl, LLaMA-Factory"),
    "eval_steps": ("train --eval-every", "TRL, Axolotl, LLaMA-Factory"),
    "evals_per_epoch": ("train --eval-every", "Axolotl"),
    "eval_strategy": ("train --eval-every", "TRL, LLaMA-Factory"),
    "resume_from_checkpoint": ("the same command resumes from its last checkpoint", "TRL, Axolotl, torchtune"),
    "plot_loss": ("curves.png is drawn if matplotlib is installed", "LLaMA-Factory"),
    "wandb_project": ("train --report-to", "Axolotl"),
    "use_wandb": ("train --report-to", "Axolotl"),
    "push_to_hub": ("nothing is uploaded; `hf upload` does it", "TRL"),
    "random_state": ("train --seed", "Unsloth"),
    "data_seed": ("train --seed", "TRL"),
}

#: How alike a word must be to be suggested, from 0 to 1.
_ALIKE = 0.6


def near(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like another.

    Args:
        word: What was found.
        known: What is known.

    Returns:
        A known word, None if none is like it.

    >>> near("imm", ["ism", "causal", "prefix"])
    'ism'
    """
    lowered = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower().removeprefix("./"), lowered, n=1, cutoff=_ALIKE)
    return lowered[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest known word, to end a message with.

    Args:
        word: What was found.
        known: What is known.

    Returns:
        ` Did you mean 'ism'?`, or an empty string if no known word is like it.
    """
    meant = near(word, known)
    return "" if meant is None else f" Did you mean {meant!r}?"


def foreign_name(word: str) -> tuple[str, str] | None:
    """Look up an option of another trainer.

    Args:
        word: A flag or a key, as in `--max-steps`, `max_steps` or `optimizer.lr`.

    Returns:
        What it is here and whose it is, as in `FOREIGN_NAMES`; None if it is not known.

    >>> foreign_name("--max-steps")
    ('train --steps', 'TRL, Axolotl, LLaMA-Factory')
    """
    name = word.strip().lstrip("-").replace("-", "_").lower()
    return FOREIGN_NAMES.get(name) or FOREIGN_NAMES.get(name.rpartition(".")[2])


#: Commands of other tools -> the command that does it here.
FOREIGN_COMMANDS: dict[str, str] = {
    "help": "--help",
    "version": "--version",
    "preprocess": "pack",
    "prepare": "convert",
    "tokenize": "pack",
    "sft": "train",
    "finetune": "train",
    "fine-tune": "train",
    "fit": "train",
    "evaluate": "eval",
    "test": "eval",
    "inference": "chat",
    "generate": "chat",
    "show": "inspect",
    "info": "inspect",
    "check": "verify",
    "validate": "verify",
    "split": "convert --split",
}
