"""Train a model on packed shards with Hugging Face's Trainer. Read `train` top to bottom.

The output folder holds the model (safetensors, with the mask in config.json as `ismdata_mask`), the shards' tokenizer,
`README.md` (its card), `metrics.csv` with `curves.png`, `run.json` and `checkpoints/`. It is written as
`.NAME.partial` beside its final name and renamed last; a run that breaks off leaves that folder behind if it had
reached a checkpoint, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import logging as python_logging
import platform
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from ismdata import __version__
from ismdata.attention import attach, attached_backend, check_layout, check_training, open_model, tokenizer_files
from ismdata.data import PackedDataset, check_serves
from ismdata.distributed import is_first_process, on_first_process, together
from ismdata.errors import DataError, Terminated, UsageError
from ismdata.train.checkpoints import CHECKPOINTS_NAME, go_on, partial_folder, step_of, training_folder, weights_digest
from ismdata.train.export import save_model, write_card
from ismdata.train.lora import with_lora
from ismdata.train.loss import TrainingCollator, compute_loss_at_targets
from ismdata.train.metrics import METRICS, METRICS_NAME, RunMetrics, draw_curves, read_column
from ismdata.train.options import TrainOptions
from ismdata.train.order import Order, OrderedDataset
from ismdata.train.progress import Cost, TrainProgress
from ismdata.train.trainer import PackedTrainer, StopSignals

__all__ = ["METRICS", "METRICS_NAME", "TrainReport", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did, over all its restarts. The losses are those of the first and the last line of metrics.csv."""

    output: Path
    mask: str
    backend: str
    parameters: int
    steps: int
    first_loss: float
    last_loss: float
    tokens: int
    target_tokens: int
    seconds: float
    device: str
    dtype: str


def train(
    packed: Path,
    *,
    output: Path,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    options: TrainOptions | None = None,
    **fields: Any,
) -> TrainReport:
    """Train a model on the sequences of `packed` and save it to `output`.

    options: how; or the same as keywords, of which `model` alone must be given. Where an earlier call broke off, the
    same call goes on from its last checkpoint. On several processes (torchrun) each of them makes this call.

    Raises UsageError, DataError and UnsupportedModelError before any training where that is possible, and Terminated or
    KeyboardInterrupt after a checkpoint where a signal ended the run.
    """
    options = TrainOptions(**fields) if options is None else dataclasses.replace(options, **fields)
    on_gpu = torch.cuda.is_available()
    precision = ("bfloat16" if on_gpu else "float32") if options.precision == "auto" else options.precision
    _quiet()
    processes = PartialState(cpu=not on_gpu).num_processes
    if not is_first_process():
        say = _nothing
    dataset = PackedDataset(packed)
    mask = dataset.mask if options.mask is None else options.mask
    collator = TrainingCollator(mask, options.loss_weighting)
    try:
        check_serves(mask, packed_mask=dataset.mask)
    except UsageError as error:
        raise UsageError(f"{packed}: {error}") from error
    evaluated = None if options.eval is None else _evaluation_set(Path(options.eval), dataset, mask)
    accumulation, order = _plan(dataset, options, processes)
    _check_here(options, on_gpu=on_gpu)
    tokenizer = tokenizer_files(packed)
    stop = StopSignals(alone=processes == 1)
    partial = partial_folder(output)

    with ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(training_folder(output, inputs=[packed], overwrite=overwrite)))
        set_seed(options.seed)
        model = together(lambda: open_model(options.model, dataset))
        _tell_of_another_mask(model, mask, say)
        check_layout(model, options.model, layout=dataset.layout)
        autocast = torch.bfloat16 if precision == "bfloat16" else None
        device = PartialState().device
        attach(model, options.backend, mask, device=device, autocast=autocast)
        check_training(model, device=device, autocast=autocast)
        collator = replace(collator, tables=attached_backend(model) == "varlen")
        if not compute_loss_at_targets(model):
            say(f"{options.model}: its head cannot be parted from its loss, so logits are made at every token")
        if 0 < order.steps <= options.warmup:
            say(
                f"the warm-up of {options.warmup} steps fills the run of {order.steps}: the learning rate does not get "
                "to its peak. Pass a smaller --warmup"
            )
        trained = with_lora(model, options) if options.lora else model
        identity = _identity(trained, dataset, order, options, mask=mask, precision=precision)
        decided = on_first_process(lambda: go_on(partial, identity, overwrite=overwrite))
        checkpoint, told = _from_first_process(decided)
        for line in told:
            say(line)
        if checkpoint is not None:
            say(f"going on after step {step_of(checkpoint)} of {order.steps}")
        metrics = RunMetrics(partial)
        progress = TrainProgress(say, steps=order.steps, metrics=metrics, cost=Cost(model, processes=processes))
        trainer = PackedTrainer(
            model=trained,
            args=_arguments(options, partial, order=order, accumulation=accumulation, precision=precision),
            data_collator=collator,
            train_dataset=OrderedDataset(dataset),
            eval_dataset=None if evaluated is None else OrderedDataset(evaluated),
            order=order,
            metrics=metrics,
            progress=progress,
            final=output,
            partial=partial,
            keep=options.keep,
            stop=stop,
            callbacks=_trackers(options, partial),
        )
        metrics.begin(checkpoint, write=is_first_process())
        with stop.caught(), progress.shown(0 if checkpoint is None else step_of(checkpoint)):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < order.steps:
            _raise_stopped(trainer)
        report = _report(
            partial,
            trainer,
            trained,
            output=output,
            mask=mask,
            backend=attached_backend(model),
            precision=precision,
        )
        finished, sharded = trainer.finished_model()
        on_first_process(
            lambda: _write_out(finished, sharded, partial, options, dataset, tokenizer, report, order=order, say=say)
        )
    if options.eval is not None:
        say(f"the evaluation set by turn, with intervals: {shlex.join(['ismdata', 'eval', str(output), options.eval])}")
    return report


def _plan(dataset: PackedDataset, options: TrainOptions, processes: int) -> tuple[int, Order]:
    """Micro-batches of a step on each process, and the order in which sequences are seen."""
    if len(dataset) == 0:
        raise DataError(
            f"{dataset.shards.folder}: no sequences; expected at least one to train on. Look at its quarantine.jsonl"
        )
    accumulation, global_batch = options.with_processes(processes)
    by_epochs = max(1, round(options.epochs * len(dataset)))
    total = by_epochs if options.steps is None else options.steps * global_batch
    return accumulation, Order(sequences=len(dataset), total=total, global_batch=global_batch, seed=options.seed)


def _evaluation_set(folder: Path, dataset: PackedDataset, mask: str) -> PackedDataset:
    """The shards to evaluate on. Raises where they could not be compared with those to train on."""
    evaluated = PackedDataset(folder)
    try:
        check_serves(mask, packed_mask=evaluated.mask)
    except UsageError as error:
        raise UsageError(f"--eval {folder}: {error}") from error
    found, expected = (each.shards.index["tokenizer"].get("sha256") for each in (evaluated, dataset))
    if found != expected:
        raise DataError(
            f"--eval {folder}: packed with another tokenizer (SHA-256 {str(found)[:12]}…) than "
            f"{dataset.shards.folder} ({str(expected)[:12]}…). Pack it with the same one"
        )
    if len(evaluated) == 0:
        raise DataError(f"--eval {folder}: no sequences; expected at least one. Look at its quarantine.jsonl")
    return evaluated


def _check_here(options: TrainOptions, *, on_gpu: bool) -> None:
    """Raise UsageError for what this machine cannot do."""
    _check_trackers(options.report_to)
    if options.fsdp and not on_gpu:
        raise UsageError(
            "--fsdp needs GPUs: accelerate shards models over them alone. Leave it out to train on CPUs (DDP)"
        )
    if options.fsdp and options.lora:
        raise UsageError(
            "--fsdp and --lora exclude each other: adapters are small. Leave --fsdp out to train them by DDP"
        )
    if options.precision == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise UsageError("--precision bfloat16: this GPU cannot compute in it; expected float32")


def _check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker that the Trainer does not know, or whose package is not installed."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    if "tensorboard" in names and find_spec("tensorboard") is None:
        raise UsageError("--report-to tensorboard: it is not installed. pip install tensorboard")
    others = [name for name in names if name != "tensorboard"]
    try:
        for tracker in get_reporting_integration_callbacks(others):  # type: ignore[no-untyped-call]
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--report-to {' '.join(others)}: {error}") from error


def _tell_of_another_mask(model: PreTrainedModel, mask: str, say: Callable[[str], None]) -> None:
    former = getattr(model.config, "ismdata_mask", None)
    if former not in (None, mask):
        say(f"the model was trained under the mask {former} and goes on under {mask}")


def _identity(
    trained: nn.Module, dataset: PackedDataset, order: Order, options: TrainOptions, *, mask: str, precision: str
) -> dict[str, Any]:
    """All that decides the course of a run: what may not change while it goes on."""
    return {
        "data": dataset.shards.index["sha256"],
        "weights": weights_digest(trained),
        "sequences": order.total,
        "global_batch": order.global_batch,
        "mask": mask,
        "precision": precision,
        **{name: getattr(options, name) for name in _DECIDING},
        **({name: getattr(options, name) for name in ("lora_rank", "lora_alpha")} if options.lora else {}),
    }


_DECIDING = (
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "loss_weighting",
    "seed",
    "lora",
)


def _from_first_process(decided: Any) -> Any:
    """What the first process knows, on all of them."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        box = [decided]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return decided


def _arguments(
    options: TrainOptions, partial: Path, *, order: Order, accumulation: int, precision: str
) -> TrainingArguments:
    """Our options in the Trainer's words."""
    on_gpu = torch.cuda.is_available()
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    checkpointing: dict[str, Any] = {}
    if options.gradient_checkpointing:
        # Newer releases of transformers have the one name, older ones the other.
        name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(partial / CHECKPOINTS_NAME),
        max_steps=order.steps,
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
        remove_unused_columns=False,  # the intervals are no parameters of the model's forward
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,  # a loss that is no number stops the run
        save_steps=options.save_every,
        eval_strategy="no" if options.eval_every is None else "steps",
        eval_steps=options.eval_every,
        disable_tqdm=True,
        report_to=[name for name in options.report_to if name != "tensorboard"],
        **checkpointing,
    )


def _trackers(options: TrainOptions, partial: Path) -> list[TrainerCallback]:
    """TensorBoard writes into the run's folder; the other trackers know their places."""
    if "tensorboard" not in options.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    writer = SummaryWriter(str(partial / "tensorboard")) if is_first_process() else None
    return [TensorBoardCallback(writer)]  # type: ignore[no-untyped-call]


def _raise_stopped(trainer: PackedTrainer) -> None:
    if trainer.stopped_by == signal.SIGTERM:
        raise Terminated
    raise KeyboardInterrupt(
        f"interrupted after step {trainer.state.global_step}: run the same command again to go on from there"
    )


def _report(
    partial: Path,
    trainer: PackedTrainer,
    trained: nn.Module,
    *,
    output: Path,
    mask: str,
    backend: str,
    precision: str,
) -> TrainReport:
    losses = together(lambda: read_column(partial / METRICS_NAME, "loss"))
    sums = trainer.metrics.sums
    return TrainReport(
        output=output,
        mask=mask,
        backend=backend,
        # Adapters are merged at the end: they are no parameters of what is saved.
        parameters=sum(each.numel() for name, each in trained.named_parameters() if ".lora_" not in name),
        steps=trainer.state.global_step,
        first_loss=losses[0][1],
        last_loss=losses[-1][1],
        tokens=sums.tokens,
        target_tokens=sums.target_tokens,
        seconds=sums.seconds,
        device=str(trainer.args.device),
        dtype=precision,
    )


def _write_out(
    model: nn.Module,
    weights: dict[str, Tensor] | None,
    folder: Path,
    options: TrainOptions,
    dataset: PackedDataset,
    tokenizer: list[Path],
    report: TrainReport,
    *,
    order: Order,
    say: Callable[[str], None],
) -> None:
    """All that the finished folder holds besides metrics and checkpoints."""
    save_model(model, weights, folder, dataset=dataset, tokenizer_files=tokenizer)
    if not draw_curves(folder):
        say("no curves.png: pip install 'ismdata[plots]' draws it")
    evaluations = read_column(folder / METRICS_NAME, "eval_loss")
    facts = {
        "parameters": f"{report.parameters:,}",
        "steps": f"{report.steps:,}",
        "sequences seen": f"{order.total:,}",
        "tokens seen": f"{report.tokens:,}, of which {report.target_tokens:,} targets",
        "loss, first and last line": f"{report.first_loss:.4f}, {report.last_loss:.4f}",
        **({"evaluation loss": f"{evaluations[-1][1]:.4f}"} if evaluations else {}),
        "time": f"{report.seconds:,.0f} s on {report.device}, {report.dtype}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, ismdata {__version__}",
    }
    write_card(folder, options=options, dataset=dataset, mask=report.mask, global_batch=order.global_batch, facts=facts)
    if not any((folder / CHECKPOINTS_NAME).glob("checkpoint-*")):
        shutil.rmtree(folder / CHECKPOINTS_NAME, ignore_errors=True)


def _quiet() -> None:
    """Leave it to the first process to speak, and to progress bars on a terminal."""
    if not (sys.stderr.isatty() and is_first_process()):
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # It compares intervals, which may change while a run goes on; what may not is compared by checkpoints.py.
    python_logging.getLogger("transformers.trainer_utils").setLevel(python_logging.ERROR)
    if not is_first_process():
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        python_logging.getLogger("torch").setLevel(python_logging.ERROR)
        warnings.simplefilter("ignore")


def _nothing(line: str) -> None:
    """What the other processes say."""
