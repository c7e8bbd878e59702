"""Hugging Face's Trainer as `ismdata train` uses it.

`PackedTrainer` changes what a step's loss is a mean over (`loss.py`), stops before a non-finite loss or gradient
reaches the weights, writes exact metrics (`metrics.py`) and seals checkpoints (`checkpoints.py`). `StepControl` decides
after which steps to log, evaluate, save and stop. The order of the sequences is the dataset's (`order.py`).
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ismdata.distributed import is_first_process, on_first_process, together
from ismdata.errors import DataError
from ismdata.train.checkpoints import CHECKPOINTS_NAME, remove_old_checkpoints, seal_checkpoint, what_is_left
from ismdata.train.loss import COUNTS, PAIRS, TARGETS, TOKENS, count_correct, take_counts
from ismdata.train.metrics import RunMetrics
from ismdata.train.order import PADDING_ROW, Order
from ismdata.train.progress import TrainProgress

Batch = dict[str, Tensor]

#: The private methods of transformers' Trainer that PackedTrainer overrides, and why no public hook does the same.
#: tests/train/test_trainer.py compares their signatures with the installed release's.
PRIVATE_OVERRIDES = {
    "_get_grad_norm": "called once per step, after the last backward pass and before the optimizer; the public "
    "callback of that moment, on_pre_optimizer_step, is not given the norm, and computing it again costs a pass over "
    "all gradients",
    "_save_checkpoint": "a full disk may make any of its files fail, on one process only, while the others wait; "
    "save_model writes the weights only, and on_save runs after all of it",
}

#: The signals that end a run after its current step.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
        """Return a step's micro-batches and the items of all processes' micro-batches, the divisor of its loss.

        The processes also agree here on whether one of them received a signal, so that all stop after the same step.
        """
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        received = torch.tensor([self.stop.received == number for number in _STOP_SIGNALS], device=device)
        counts = torch.stack([take_counts(batch) for batch in batches]).sum(0).to(device)
        totals = torch.cat([counts, received])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        *values, terminated, interrupted = totals.tolist()
        self._counts = dict(zip(COUNTS, values, strict=True))
        if terminated or interrupted:
            self.stopped_by = signal.SIGTERM if terminated else signal.SIGINT
        self._batches, self._losses, self._correct = batches, [], []
        return batches, totals[0].clamp(min=1)

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
        totals = torch.stack([torch.stack(each).to(torch.float64).sum() for each in (self._losses, self._correct)])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        (loss, correct), norm_value = totals.tolist(), float(norm)
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
        """Return the mean loss and the accuracy over all targets of the evaluation set, each counting the same."""
        model = self.model_wrapped
        training = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        one = torch.ones((), device=self.args.device)
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                counts = dict(zip(COUNTS, take_counts(batch), strict=True))
                batch.pop("loss_weight", None)
                with self.accelerator.autocast():
                    output = model(**batch, num_items_in_batch=one)
                totals[0] += output["loss"]
                totals[1] += self._count_correct(output, batch["labels"])
                totals[2] += counts[TARGETS]
        model.train(training)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        loss, accuracy = (totals[:2] / totals[2].clamp(min=1)).tolist()
        logs = {"eval_loss": loss, "eval_token_accuracy": accuracy}
        if is_first_process():
            self.metrics.line(self.state.global_step, **logs)
        self.progress.log(logs)
        super().log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def finished_model(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Return the trained model without its wrappers and, if it is sharded, its weights.

        All processes must call it; only the first one gets the weights.
        """
        model: nn.Module = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        return model, self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and seal it, then remove older ones."""
        folder = self.partial / CHECKPOINTS_NAME / f"checkpoint-{self.state.global_step}"
        together(lambda: self._write(folder, lambda: super(PackedTrainer, self)._save_checkpoint(model, trial)))
        on_first_process(lambda: self._write(folder, lambda: self._seal(folder)))

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.progress.advance(state.global_step)
        last = state.global_step == state.max_steps
        if state.global_step == 1 or last:
            control.should_log = True
        if last and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
        if self.trainer.stopped_by is not None:
            control.should_save = True
            control.should_training_stop = True


class StopSignals:
    """Remembers SIGTERM and Ctrl-C until the step is done.

    Args:
        alone: Whether this is the only process; a second Ctrl-C then ends it at once.
    """

    def __init__(self, *, alone: bool) -> None:
        self.received: int | None = None
        self.alone = alone

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context a signal is only remembered. Outside the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._remember) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.received == signal.SIGINT == number and self.alone:
            raise KeyboardInterrupt
        self.received = self.received or number
