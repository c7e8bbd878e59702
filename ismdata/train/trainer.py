"""Hugging Face's Trainer as `ismdata train` uses it.

`PackedTrainer` changes what a step's loss is a mean over (`loss.py`), stops before a non-finite loss or gradient
reaches the weights, writes exact metrics (`metrics.py`) and seals checkpoints (`checkpoints.py`). `StepControl` decides
after which steps to log, evaluate, save and stop. The order of the sequences is the dataset's (`order.py`).
"""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ismdata.distributed import is_first_process, on_first_process, together
from ismdata.errors import DataError, Terminated
from ismdata.train.checkpoints import CHECKPOINTS_NAME, remove_old_checkpoints, seal_checkpoint, what_is_left
from ismdata.train.loss import COUNTS, PAIRS, TARGETS, TOKENS, count_correct, take_counts
from ismdata.train.metrics import RunMetrics
from ismdata.train.order import PADDING_ROW, Order
from ismdata.train.progress import TrainProgress
from ismdata.train.stop_signals import CHECKPOINT, EVALUATION, STOP_SIGNALS, StopSignals

Batch = dict[str, Tensor]

#: The private methods of transformers' Trainer that PackedTrainer overrides, and why no public hook does the same.
#: tests/train/test_trainer.py compares their signatures with the installed release's.
PRIVATE_OVERRIDES = {
    "_get_grad_norm": "called once per step, after the last backward pass and before the optimizer; the public "
    "callback of that moment, on_pre_optimizer_step, is not given the norm, and computing it again costs a pass over "
    "all gradients",
    "_issue_warnings_after_load": "it warns of each tied weight, which a checkpoint holds once, and goes on without a "
    "weight that is missing",
    "_save_checkpoint": "a full disk may make any of its files fail, on one process only, while the others wait; "
    "save_model writes the weights only, and on_save runs after all of it",
}


class PackedTrainer(Trainer):
    """The Trainer for packed sequences; the module's docstring says what it changes.

    Args:
        order: The order of the sequences, which error messages name.
        metrics: Receives the counts and losses of each step.
        progress: Reports what is logged.
        final: The output folder's final path. A batch with a non-finite loss is saved beside it.
        partial: The folder that the run writes into.
        keep: How many checkpoints to keep.
        stop: The signals received so far.
        options: The Trainer's own arguments.
    """

    def __init__(
        self,
        *,
        order: Order,
        metrics: RunMetrics,
        progress: TrainProgress,
        final: Path,
        partial: Path,
        keep: int,
        stop: StopSignals,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # so that the Trainer does not divide the loss by the accumulation
        self.remove_callback(PrinterCallback)
        self.add_callback(StepControl(self))
        self.order = order
        self.metrics = metrics
        self.progress = progress
        self.final = final
        self.partial = partial
        self.keep = keep
        self.stop = stop
        self.stopped_by: int | None = None
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._counts = dict.fromkeys(COUNTS, 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Return a step's micro-batches and the items of all processes' micro-batches, the divisor of its loss."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        counts = torch.stack([take_counts(batch) for batch in batches]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        self._counts = dict(zip(COUNTS, counts.tolist(), strict=True))
        self._batches, self._losses, self._correct = batches, [], []
        return batches, counts[0].clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's part of the step's loss, times the processes, over which DDP averages gradients."""
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        self._losses.append(output["loss"].detach())
        self._correct.append(self._count_correct(output, inputs["labels"]))
        loss = output["loss"] * self.args.world_size
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Record the step, whose loss and counts are complete by now. Raises DataError if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        sums = torch.stack([torch.stack(each).to(torch.float64).sum() for each in (self._losses, self._correct)])
        (loss, correct), norm_value = self.reduced(sums), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            together(lambda: self._refuse_step(loss, norm_value))
        counts = self._counts
        self.metrics.add_step(
            loss=loss,
            correct=int(correct),
            tokens=counts[TOKENS],
            target_tokens=counts[TARGETS],
            pairs=counts[PAIRS],
        )
        return norm

    def _count_correct(self, output: Any, labels: Tensor) -> Tensor:
        model: Any = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT model
        return count_correct(base, output.get("logits"), labels).detach()

    def reduced(self, values: Tensor) -> list[float]:
        """Sum values, float64[…], over the processes, and agree on whether one of them received a signal.

        All processes must call it at the same point; they then stop there together.
        """
        received = [self.stop.received == number for number in STOP_SIGNALS]
        totals = torch.cat([values.flatten(), torch.tensor(received, dtype=values.dtype, device=values.device)])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        *sums, terminated, interrupted = totals.tolist()
        if terminated or interrupted:
            self.stopped_by = signal.SIGTERM if terminated else signal.SIGINT
        return sums

    def interruption(self) -> BaseException:
        """What a run that a signal stopped raises, once its checkpoint is written."""
        if self.stopped_by == signal.SIGTERM:
            return Terminated()
        return KeyboardInterrupt(
            f"interrupted after step {self.state.global_step}; run the same command again to resume from there"
        )

    def _refuse_step(self, loss: float, grad_norm: float) -> None:
        """Save this process's batches of the step and raise a DataError that names the file."""
        step = self.state.global_step
        suffix = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        path = self.final.parent / f"{self.final.name}-step-{step + 1}-batch{suffix}.safetensors"
        names = self._batches[0].keys()
        save_file({name: torch.cat([batch[name].cpu() for batch in self._batches]) for name in names}, path)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
        rows = [row for row in self.order.step(step) if row != PADDING_ROW]
        raise DataError(
            f"{self.final}: {what} at step {step + 1}; the weights are still those of step {step}. Its sequences "
            f"({', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}) are saved in {path}. Look at them with "
            f"`ismdata inspect PACKED --row {rows[0]}`, or lower --learning-rate. {what_is_left(self.partial)}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer logs, with our loss, which a resumed run continues exactly, and with the speed."""
        if "loss" in logs:
            norm = logs.get("grad_norm", math.nan)
            logs["loss"], logs["token_accuracy"] = self.metrics.close_window()
            if is_first_process():
                self.metrics.line(
                    self.state.global_step,
                    loss=logs["loss"],
                    token_accuracy=logs["token_accuracy"],
                    learning_rate=logs["learning_rate"],
                    grad_norm=float(norm),
                )
            speed, target_speed = self.metrics.speed()
            logs |= {"tokens_per_second": speed, "target_tokens_per_second": target_speed}
            self.progress.log(logs)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss and the accuracy over all targets of the evaluation set, each counting the same.

        A signal ends the evaluation; the run then stops with a checkpoint, and evaluates again when it is resumed.
        """
        self.metrics.sums.evaluation_due = True
        with self.metrics.paused(), self.stop.during(EVALUATION):
            logs = self._evaluation()
        if self.stopped_by is not None:
            self.control.should_save = self.control.should_training_stop = True
        if logs is None:
            self.control.should_evaluate = False
            return {}
        self.metrics.sums.evaluation_due = False
        if is_first_process():
            self.metrics.line(self.state.global_step, **logs)
        self.progress.log(logs)
        super().log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _evaluation(self) -> dict[str, float] | None:
        """The loss and the accuracy over the evaluation set; None if a signal ended the evaluation."""
        model = self.model_wrapped
        training = model.training
        batches = self.get_eval_dataloader()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        one = torch.ones((), device=self.args.device)
        model.eval()
        try:
            with torch.no_grad():
                for done, batch in enumerate(batches):
                    self.progress.evaluated(done, len(batches))
                    counts = dict(zip(COUNTS, take_counts(batch), strict=True))
                    batch.pop("loss_weight", None)
                    with self.accelerator.autocast():
                        output = model(**batch, num_items_in_batch=one)
                    sums[0] += output["loss"]
                    sums[1] += self._count_correct(output, batch["labels"])
                    sums[2] += counts[TARGETS]
                    if self.received_signal():
                        return None
        finally:
            model.train(training)
            self.progress.evaluated(len(batches), len(batches))
        loss, correct, targets = self.reduced(sums)
        return {"eval_loss": loss / max(targets, 1), "eval_token_accuracy": correct / max(targets, 1)}

    def received_signal(self) -> bool:
        """Whether one of the processes received a signal. All of them must ask at the same point."""
        if self.args.world_size > 1 or self.stop.received is not None:
            self.reduced(torch.zeros(0, device=self.args.device))
        return self.stopped_by is not None

    def finished_model(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Return the trained model without its wrappers and, if it is sharded, its weights.

        All processes must call it; only the first one gets the weights.
        """
        model: nn.Module = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        return model, self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and seal it, then remove older ones."""
        folder = self.partial / CHECKPOINTS_NAME / f"checkpoint-{self.state.global_step}"
        with self.metrics.paused(), self.stop.during(CHECKPOINT):
            together(lambda: self._write(folder, lambda: super(PackedTrainer, self)._save_checkpoint(model, trial)))
            on_first_process(lambda: self._write(folder, lambda: self._seal(folder)))
        if self.received_signal():
            self.control.should_training_stop = True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise DataError if a checkpoint lacks a weight. Tied weights are in it under one of their names."""
        assert isinstance(self.model, nn.Module)
        state = self.model.state_dict(keep_vars=True)
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        loaded = {id(weight) for name, weight in state.items() if name not in load_result.missing_keys}
        lost = [name for name in load_result.missing_keys if id(state[name]) not in loaded and name not in ignored]
        if lost or load_result.unexpected_keys:
            raise DataError(
                f"{self.partial}: the checkpoint's weights are not those of the model: {len(lost)} are missing and "
                f"{len(load_result.unexpected_keys)} are of another model ({[*lost, *load_result.unexpected_keys][0]}, "
                "…). Pass --overwrite to start over"
            )

    def _seal(self, folder: Path) -> None:
        self.metrics.save(folder)
        seal_checkpoint(folder)
        remove_old_checkpoints(self.partial, self.keep)

    def _write(self, folder: Path, write: Callable[[], None]) -> None:
        """Call `write`. If the disk refuses, remove the checkpoint and raise a DataError."""
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # torch.save reports a full disk as such a RuntimeError; any other is a bug
            shutil.rmtree(folder, ignore_errors=True)
            cause = str(error).strip().splitlines()[0]
            raise DataError(
                f"{folder}: the checkpoint could not be written ({cause}). Free some space. "
                f"{what_is_left(self.partial)}"
            ) from error


class StepControl(TrainerCallback):
    """Logs after the first and the last step too, evaluates after the last, and saves and stops after a signal."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The state of a checkpoint has its run's log and save intervals; a resumed run may have others.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]
        if self.trainer.metrics.sums.evaluation_due and self.trainer.eval_dataset is not None:
            self.trainer.evaluate()
            if self.trainer.stopped_by is not None:
                raise self.trainer.interruption()  # the checkpoint that it resumed from is still the newest state

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.progress.advance(state.global_step)
        last = state.global_step == state.max_steps
        if state.global_step == 1 or last:
            control.should_log = True
        if last and trainer.eval_dataset is not None:
            control.should_evaluate = True
        if args.world_size == 1:
            trainer.received_signal()  # several processes agreed on it with the step's loss
        if trainer.stopped_by is not None:
            trainer.metrics.sums.evaluation_due = control.should_evaluate
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
