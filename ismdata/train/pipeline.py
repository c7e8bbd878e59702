"""Train a model on packed shards with Hugging Face's Trainer.

The output folder holds the model (safetensors, with the mask in config.json as `ismdata_mask`), the shards' tokenizer,
`README.md` (the model card), `metrics.csv` with `curves.png`, `run.json` and `checkpoints/`. A run writes into
`.NAME.partial` beside it and renames that last. An interrupted run leaves that folder if it has a checkpoint, and the
same command resumes from there.
"""

from __future__ import annotations

import logging as python_logging
import math
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ismdata import __version__
from ismdata.attention import (
    attach,
    attached_backend,
    check_layout,
    check_training,
    library_bars,
    open_model,
    tokenizer_files,
    weights_digest,
)
from ismdata.data import PackedDataset, check_serves, partial_folder
from ismdata.display import LOGGED, Reporter
from ismdata.distributed import is_first_process, on_first_process, together
from ismdata.errors import DataError, UsageError
from ismdata.train.checkpoints import CHECKPOINTS_NAME, find_checkpoint, step_of, training_folder, what_is_left
from ismdata.train.collate import TrainingCollator
from ismdata.train.export import save_model
from ismdata.train.lora import with_lora
from ismdata.train.loss import compute_loss_at_targets
from ismdata.train.metrics import METRICS_NAME, RunMetrics, draw_curves, read_column
from ismdata.train.model_card import Card, describe_base
from ismdata.train.options import TrainOptions
from ismdata.train.order import Order, OrderedDataset, PaddedDataset
from ismdata.train.progress import Cost, SilentReporter, TrainProgress
from ismdata.train.starting_loss import report_starting_loss
from ismdata.train.stop_signals import StopSignals
from ismdata.train.trainer import PackedTrainer
from ismdata.train.trainer_arguments import check_trackers, tracker_callbacks, training_arguments

#: exp of more is beyond a float.
_LARGEST_EXPONENT = 700.0

#: Options that decide a run's result; a resumed run must have the same.
_DECIDING_OPTIONS = (
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "loss_weighting",
    "seed",
    "lora",
)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did, its interrupted parts included.

    `first_loss` and `last_loss` are those of the first and the last line of metrics.csv, `evaluations` the losses of
    the first and the last evaluation, or of the only one. `evaluation_set` is the folder evaluated on.
    `starting_losses` are those of one micro-batch before the first step, by mask; empty for a preset and for a run that
    was resumed.
    """

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
    evaluations: tuple[float, ...] = ()
    evaluation_set: str | None = None
    starting_losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run as its options and its shards determine it, before the model is loaded."""

    options: TrainOptions
    output: Path
    dataset: PackedDataset
    evaluation: PackedDataset | None
    tokenizer: list[Path]
    mask: str
    precision: str
    processes: int
    accumulation: int
    order: Order

    @property
    def partial(self) -> Path:
        return partial_folder(self.output)

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bfloat16" else None


def train(
    packed: Path,
    *,
    output: Path,
    options: TrainOptions | None = None,
    overwrite: bool = False,
    reporter: Reporter = LOGGED,
    **fields: Any,
) -> TrainReport:
    """Train a model on the sequences of a packed folder.

    After an interruption the same call resumes from the last checkpoint. With several processes (torchrun) each makes
    this call.

    Args:
        packed: A folder that `ismdata pack` wrote.
        output: The folder to write. It appears when it is complete.
        options: How to train.
        fields: Fields of `TrainOptions`, in place of `options` or to change some of them.
        overwrite: Whether to replace an older output, or the checkpoints of another run.
        reporter: Receives a line per log, and the progress of the steps.

    Returns:
        What the run did.

    Raises:
        UsageError: if an option is invalid here, or the output folder is in use.
        DataError: if the shards, the model or an interrupted run does not fit, a file cannot be read or written, or a
            loss is not finite.
        UnsupportedModelError: if the mask cannot work inside the model.
        Terminated: after a checkpoint, if SIGTERM ended the run.
        KeyboardInterrupt: after a checkpoint, if Ctrl-C did.

    Example:
        train(Path("packed"), output=Path("model"), options=TrainOptions(model="tiny", steps=100))
    """
    options = TrainOptions(**fields) if options is None else replace(options, **fields)
    _quiet_libraries()
    if not is_first_process():
        reporter = SilentReporter()
    run = _plan_run(packed, output, options)
    stop = StopSignals(alone=run.processes == 1, reporter=reporter)
    with ExitStack() as stack:
        folder = training_folder(output, inputs=[packed], overwrite=overwrite, reporter=reporter)
        on_first_process(lambda: stack.enter_context(folder))
        stack.enter_context(_explained_interrupt(run.partial))
        stack.enter_context(library_bars(reporter))
        set_seed(options.seed)
        model = _open_model(run, reporter)
        trained = with_lora(model, options) if options.lora else model
        checkpoint = _find_checkpoint(run, trained, reporter, overwrite=overwrite)
        trainer = _make_trainer(run, model, trained, stop, reporter)
        trainer.metrics.begin(checkpoint, write=is_first_process())
        trainer.progress.begin(0 if checkpoint is None else step_of(checkpoint))
        starting = {} if checkpoint is not None else _starting_losses(run, model, trainer, reporter)
        with stop.deferred():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < run.order.steps or trainer.metrics.sums.evaluation_due:
            raise trainer.interruption()
        report = replace(_report(run, trainer, trained, attached_backend(model)), starting_losses=starting)
        finished, sharded = trainer.finished_model()
        on_first_process(lambda: _write_output(run, report, finished, sharded, reporter))
    return report


def _plan_run(packed: Path, output: Path, options: TrainOptions) -> _Run:
    """Open the shards and check the options against them and against this machine."""
    on_gpu = torch.cuda.is_available()
    processes = PartialState(cpu=not on_gpu).num_processes
    dataset = PackedDataset(packed)
    mask = dataset.mask if options.mask is None else options.mask
    TrainingCollator(mask, options.loss_weighting)  # refuses an unknown mask
    check_serves(mask, packed_mask=dataset.mask, place=str(packed))
    evaluation = None if options.eval is None else _evaluation_set(Path(options.eval), dataset, mask)
    if len(dataset) == 0:
        raise DataError(f"{packed}: no sequences; expected at least one to train on. Look at its quarantine.jsonl")
    accumulation, global_batch = options.batches_per_step(processes)
    by_epochs = max(1, round(options.epochs * len(dataset)))
    total = by_epochs if options.steps is None else options.steps * global_batch
    _check_machine(options, on_gpu=on_gpu)
    return _Run(
        options=options,
        output=output,
        dataset=dataset,
        evaluation=evaluation,
        tokenizer=tokenizer_files(packed),
        mask=mask,
        precision=("bfloat16" if on_gpu else "float32") if options.precision == "auto" else options.precision,
        processes=processes,
        accumulation=accumulation,
        order=Order(sequences=len(dataset), total=total, global_batch=global_batch, seed=options.seed),
    )


def _evaluation_set(folder: Path, dataset: PackedDataset, mask: str) -> PackedDataset:
    """The shards to evaluate on, if their mask and tokenizer are those of the shards to train on."""
    evaluation = PackedDataset(folder)
    check_serves(mask, packed_mask=evaluation.mask, place=f"--eval {folder}")
    found, expected = (each.shards.index["tokenizer"].get("sha256") for each in (evaluation, dataset))
    if found != expected:
        raise DataError(
            f"--eval {folder}: packed with another tokenizer (SHA-256 {str(found)[:12]}…) than "
            f"{dataset.shards.folder} ({str(expected)[:12]}…). Pack it with the same one"
        )
    if len(evaluation) == 0:
        raise DataError(f"--eval {folder}: no sequences; expected at least one. Look at its quarantine.jsonl")
    return evaluation


def _check_machine(options: TrainOptions, *, on_gpu: bool) -> None:
    """Raise UsageError for an option that this machine or its packages do not support."""
    check_trackers(options.report_to)
    if options.fsdp and not on_gpu:
        raise UsageError(
            "--fsdp requires GPUs: accelerate shards models over GPUs only. Leave it out to train on CPUs (DDP)"
        )
    if options.fsdp and options.lora:
        raise UsageError(
            "--fsdp and --lora exclude each other. Adapters are small: leave --fsdp out to train them by DDP"
        )
    if options.precision == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise UsageError("--precision is bfloat16, which this GPU does not support; expected float32")


def _open_model(run: _Run, reporter: Reporter) -> PreTrainedModel:
    """Open the model, attach the mask, and check both on the device that will train."""
    options = run.options
    model = together(lambda: open_model(options.model, run.dataset, reporter=reporter))
    former = getattr(model.config, "ismdata_mask", None)
    if former not in (None, run.mask):
        reporter.note(f"{options.model} was trained under the mask {former}; this run continues under {run.mask}")
    check_layout(model, options.model, layout=run.dataset.layout)
    device = PartialState().device
    attach(model, options.backend, run.mask, device=device, autocast=run.autocast, reporter=reporter)
    check_training(model, device=device, autocast=run.autocast)
    if not compute_loss_at_targets(model):
        reporter.note(
            f"{options.model}: its output head is more than a matrix product, so logits are computed at every token"
        )
    if 0 < run.order.steps <= options.warmup:
        reporter.note(
            f"the warm-up of {options.warmup} steps is as long as the run of {run.order.steps}, so the learning rate "
            "does not reach its peak. Pass a smaller --warmup"
        )
    return model


def _find_checkpoint(run: _Run, trained: nn.Module, reporter: Reporter, *, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, the same on all processes; None to start from the beginning."""
    identity = _identity(run, trained)
    found = on_first_process(lambda: find_checkpoint(run.partial, identity, overwrite=overwrite))
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        box = [found]
        torch.distributed.broadcast_object_list(box, src=0)
        found = box[0]
    assert found is not None
    checkpoint, notes = found
    for line in notes:
        reporter.note(line)
    if checkpoint is not None:
        reporter.note(f"resuming after step {step_of(checkpoint)} of {run.order.steps}")
    return checkpoint


def _identity(run: _Run, trained: nn.Module) -> dict[str, Any]:
    """All that decides a run's result: what must not change before it is resumed."""
    options = run.options
    return {
        "data": run.dataset.shards.index["sha256"],
        "weights": weights_digest(trained),
        "sequences": run.order.total,
        "global_batch": run.order.global_batch,
        "mask": run.mask,
        "precision": run.precision,
        **{name: getattr(options, name) for name in _DECIDING_OPTIONS},
        **({name: getattr(options, name) for name in ("lora_rank", "lora_alpha")} if options.lora else {}),
    }


def _make_trainer(
    run: _Run, model: PreTrainedModel, trained: nn.Module, stop: StopSignals, reporter: Reporter
) -> PackedTrainer:
    options = run.options
    metrics = RunMetrics(run.partial)
    arguments = training_arguments(
        options,
        run.partial / CHECKPOINTS_NAME,
        steps=run.order.steps,
        accumulation=run.accumulation,
        precision=run.precision,
    )
    multiple = arguments.eval_batch_size * arguments.world_size
    return PackedTrainer(
        model=trained,
        args=arguments,
        data_collator=TrainingCollator(run.mask, options.loss_weighting, tables=attached_backend(model) == "varlen"),
        train_dataset=OrderedDataset(run.dataset, run.order),
        eval_dataset=None if run.evaluation is None else PaddedDataset(run.evaluation, multiple),
        callbacks=tracker_callbacks(options.report_to, run.partial),
        order=run.order,
        metrics=metrics,
        progress=TrainProgress(
            reporter, steps=run.order.steps, metrics=metrics, cost=Cost(model, processes=run.processes)
        ),
        final=run.output,
        partial=run.partial,
        keep=options.keep,
        stop=stop,
    )


def _starting_losses(run: _Run, model: PreTrainedModel, trainer: PackedTrainer, reporter: Reporter) -> dict[str, float]:
    dataset = run.dataset if run.evaluation is None else run.evaluation
    return report_starting_loss(
        trainer,
        dataset,
        model=run.options.model,
        mask=run.mask,
        packed_mask=dataset.mask,
        tables=attached_backend(model) == "varlen",
        reporter=reporter,
    )


@contextmanager
def _explained_interrupt(partial: Path) -> Iterator[None]:
    """Let a Ctrl-C that ends the run at once say from where it can be resumed."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        raise KeyboardInterrupt(f"interrupted. {what_is_left(partial)}") from interrupt


def _report(run: _Run, trainer: PackedTrainer, trained: nn.Module, backend: str) -> TrainReport:
    path = run.partial / METRICS_NAME
    losses = together(lambda: read_column(path, "loss"))
    evaluations = [loss for _, loss in together(lambda: read_column(path, "eval_loss"))]
    sums = trainer.metrics.sums
    return TrainReport(
        output=run.output,
        mask=run.mask,
        backend=backend,
        # Adapters are merged into the saved model, so their parameters do not count.
        parameters=sum(each.numel() for name, each in trained.named_parameters() if ".lora_" not in name),
        steps=trainer.state.global_step,
        first_loss=losses[0][1],
        last_loss=losses[-1][1],
        tokens=sums.tokens,
        target_tokens=sums.target_tokens,
        seconds=sums.seconds,
        device=str(trainer.args.device),
        dtype=run.precision,
        evaluations=(*evaluations[:1], *evaluations[1:][-1:]),
        evaluation_set=run.options.eval,
    )


def _write_output(
    run: _Run, report: TrainReport, model: nn.Module, weights: dict[str, Tensor] | None, reporter: Reporter
) -> None:
    """Write the model, its card and the curves; metrics and checkpoints are there already."""
    folder = run.partial
    base = describe_base(run.options.model)
    save_model(
        model,
        weights,
        folder,
        dataset=run.dataset,
        tokenizer_files=run.tokenizer,
        base=base.hub_name or base.name,
    )
    if not draw_curves(folder, run.mask):
        reporter.note("no curves.png, for want of matplotlib; run: pip install 'ismdata[plots]'")
    facts = {
        "parameters": f"{report.parameters:,}",
        "steps": f"{report.steps:,}",
        "sequences seen": f"{run.order.total:,}",
        "tokens seen": f"{report.tokens:,}, of which {report.target_tokens:,} targets",
        **{f"loss before training, {mask}": f"{loss:.4f}" for mask, loss in report.starting_losses.items()},
        "loss, first and last line": f"{report.first_loss:.4f}, {report.last_loss:.4f}",
        "time": f"{report.seconds:,.0f} s of steps on {report.device}, {report.dtype}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, ismdata {__version__}",
    }
    Card(
        output=run.output,
        options=run.options,
        dataset=run.dataset,
        mask=run.mask,
        global_batch=run.order.global_batch,
        facts=facts,
        evaluation=_evaluation_metrics(folder),
    ).write(folder)
    if not any((folder / CHECKPOINTS_NAME).glob("checkpoint-*")):
        shutil.rmtree(folder / CHECKPOINTS_NAME, ignore_errors=True)


def _evaluation_metrics(folder: Path) -> dict[str, float]:
    """The metrics of the last evaluation; empty if there was none."""
    losses, accuracies = (read_column(folder / METRICS_NAME, name) for name in ("eval_loss", "eval_token_accuracy"))
    if not losses:
        return {}
    found = {"loss": losses[-1][1], "perplexity": math.exp(min(losses[-1][1], _LARGEST_EXPONENT))}
    return found | ({"accuracy": accuracies[-1][1]} if accuracies else {})


def _quiet_libraries() -> None:
    """Silence what only the libraries' developers can use, and all their output on every process but the first."""
    # The Trainer warns where a checkpoint has other log and save intervals; a resumed run may change these.
    python_logging.getLogger("transformers.trainer_utils").setLevel(python_logging.ERROR)
    if not is_first_process():
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        python_logging.getLogger("torch").setLevel(python_logging.ERROR)
        warnings.simplefilter("ignore")
