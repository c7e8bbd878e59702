"""The run's options as the Trainer takes them: `TrainingArguments`, and the callbacks of experiment trackers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from ismdata.distributed import is_first_process
from ismdata.errors import UsageError
from ismdata.train.options import TrainOptions


def training_arguments(
    options: TrainOptions, folder: Path, *, steps: int, accumulation: int, precision: str
) -> TrainingArguments:
    """Translate the options for the Trainer.

    Args:
        options: The run's options.
        folder: Where the Trainer writes its checkpoints.
        steps: Optimizer steps of the run.
        accumulation: Micro-batches per step on one process.
        precision: `float32` or `bfloat16`.

    Returns:
        The Trainer's arguments.
    """
    on_gpu = torch.cuda.is_available()
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    checkpointing: dict[str, Any] = {}
    if options.gradient_checkpointing:
        # transformers renamed gradient checkpointing to activation checkpointing in a release after 5.17.
        name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        train_sampling_strategy="sequential",  # the dataset is in the run's order already
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        data_seed=options.seed,
        bf16=precision == "bfloat16",
        use_cpu=not on_gpu,
        torch_compile=options.compile,
        fsdp=options.fsdp or None,  # type: ignore[arg-type]
        fsdp_config=dict(options.fsdp_config) if options.fsdp else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,  # the model's forward does not name the intervals as parameters
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,  # PackedTrainer stops the run at a non-finite loss
        save_steps=options.save_every,
        eval_strategy="no" if options.eval_every is None else "steps",
        eval_steps=options.eval_every,
        disable_tqdm=True,
        report_to=[name for name in options.report_to if name != "tensorboard"],
        **checkpointing,
    )


def check_trackers(names: Sequence[str]) -> None:
    """Check the values of --report-to before the run starts.

    Args:
        names: Trackers, as the user typed them.

    Raises:
        UsageError: if the Trainer does not know a tracker, or its package is not installed.
    """
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    if "tensorboard" in names and find_spec("tensorboard") is None:
        raise UsageError("--report-to tensorboard: tensorboard is not installed. Run: pip install tensorboard")
    others = [name for name in names if name != "tensorboard"]
    try:
        for tracker in get_reporting_integration_callbacks(others):  # type: ignore[no-untyped-call]
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--report-to {' '.join(others)}: {error}") from error


def tracker_callbacks(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Callbacks for the trackers that the Trainer does not create itself: TensorBoard's, which writes into `folder`.

    Args:
        names: Trackers, as the user typed them.
        folder: The run's folder.

    Returns:
        The callbacks.
    """
    if "tensorboard" not in names:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    writer = SummaryWriter(str(folder / "tensorboard")) if is_first_process() else None
    return [TensorBoardCallback(writer)]  # type: ignore[no-untyped-call]
