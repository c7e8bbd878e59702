"""Hugging Face's Trainer as `ismdata train` uses it: our order, our loss, sealed checkpoints, exact metrics.

What is changed, and nothing else: which sequences a step sees (`order.py`), what its loss is a mean over (`loss.py`),
that a loss which is no number stops the run before it spoils the weights, that checkpoints are good or removed
(`checkpoints.py`), that a signal ends a run after its step, and what is written and said (`metrics.py`).
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
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ismdata.distributed import is_first_process, on_first_process, together
from ismdata.errors import DataError
from ismdata.train.checkpoints import CHECKPOINTS_NAME, remove_old_checkpoints, seal_checkpoint, what_is_left
from ismdata.train.loss import COUNTS
from ismdata.train.metrics import RunMetrics
from ismdata.train.order import NOTHING, Order, OrderSampler
from ismdata.train.progress import TrainProgress

Batch = dict[str, Tensor]

#: The signals that end a run after its step.
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class PackedTrainer(Trainer):
    """See the file. `final`: the output's name, beside which a batch is saved that makes no number of a loss."""

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
        self.remove_callback(PrinterCallback)
        self.add_callback(_Moments(self))
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
        self._counts = [0, 0, 0, 0]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return OrderSampler(self.order)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of a step, and the items of all processes' micro-batches: what its loss is a mean over.

        Whether a signal came is settled here as well, so that all processes stop after the same step.
        """
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        received = torch.tensor([self.stop.received == number for number in _STOPPING], device=device)
        totals = torch.cat([torch.stack([batch.pop(COUNTS).to(device) for batch in batches]).sum(0), received])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        *self._counts, terminated, interrupted = totals.tolist()
        if terminated or interrupted:
            self.stopped_by = signal.SIGTERM if terminated else signal.SIGINT
        self._batches, self._losses = batches, []
        return batches, totals[0].clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss, times the processes, over which gradients are averaged."""
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        self._losses.append(output["loss"].detach())
        loss = output["loss"] * self.args.world_size
        return (loss, output) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        self.model_accepts_loss_kwargs = True  # the loss is a mean over the step already
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, after its last backward and before the optimizer: the step's numbers are complete."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        total = torch.stack(self._losses).to(torch.float64).sum()
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, "sum")
        loss, norm_value = float(total), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            together(lambda: self._refuse_step(loss, norm_value))
        _, tokens, target_tokens, pairs = self._counts
        self.metrics.add_step(loss=loss, tokens=tokens, target_tokens=target_tokens, pairs=pairs)
        return norm

    def _refuse_step(self, loss: float, grad_norm: float) -> None:
        """Save what this process fed the model in this step, and raise DataError that names it."""
        step = self.state.global_step
        suffix = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        path = self.final.parent / f"{self.final.name}-step-{step + 1}-batch{suffix}.safetensors"
        names = self._batches[0].keys()
        save_file({name: torch.cat([batch[name].cpu() for batch in self._batches]) for name in names}, path)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
        rows = [row for row in self.order.step(step) if row != NOTHING]
        raise DataError(
            f"{self.final}: {what} at step {step + 1}, before the weights were changed by it. Its sequences "
            f"({', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}) are saved in {path}; look at them with "
            f"`ismdata inspect PACKED --row {rows[0]}`, or lower --learning-rate. {what_is_left(self.partial)}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What the Trainer logs, with our loss, which is exact across restarts, and with the speed."""
        if "loss" in logs:
            norm = logs.get("grad_norm", math.nan)
            logs["loss"] = self.metrics.close_window()
            if is_first_process():
                self.metrics.line(
                    self.state.global_step,
                    loss=logs["loss"],
                    learning_rate=logs["learning_rate"],
                    grad_norm=float(norm),
                )
            speed, target_speed = self.metrics.speed()
            logs |= {"tokens_per_second": speed, "target_tokens_per_second": target_speed}
            self.progress(logs)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss over all targets of the evaluation set, each counting the same."""
        model = self.model_wrapped
        training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        one = torch.ones((), device=self.args.device)
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                counts = batch.pop(COUNTS)
                batch.pop("loss_weight", None)
                with self.accelerator.autocast():
                    totals[0] += model(**self._prepare_inputs(batch), num_items_in_batch=one)["loss"]
                totals[1] += counts[2]
        model.train(training)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        loss = float(totals[0] / totals[1].clamp(min=1))
        if is_first_process():
            self.metrics.line(self.state.global_step, eval_loss=loss)
        logs = {"eval_loss": loss}
        self.progress(logs)
        super().log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        """The evaluation set in its own order, filled up with padding so that it can be cut evenly."""
        batch = self.args.eval_batch_size * self.args.world_size
        rows = list(range(len(eval_dataset)))
        return _Rows(rows + [NOTHING] * (-len(rows) % batch))

    def finished_model(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """The trained model without what training put around it, and its weights where they are sharded.

        All processes call it; the first one has the weights.
        """
        model: nn.Module = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        return model, self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and seal it; only then are older ones removed."""
        folder = self.partial / CHECKPOINTS_NAME / f"checkpoint-{self.state.global_step}"
        together(lambda: self._written(folder, lambda: super(PackedTrainer, self)._save_checkpoint(model, trial)))
        on_first_process(lambda: self._written(folder, lambda: self._seal(folder)))

    def _seal(self, folder: Path) -> None:
        self.metrics.save(folder)
        seal_checkpoint(folder)
        remove_old_checkpoints(self.partial, self.keep)

    def _written(self, folder: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # not the disk's fault
            shutil.rmtree(folder, ignore_errors=True)
            cause = str(error).strip().splitlines()[0]
            raise DataError(
                f"{folder}: the checkpoint could not be written ({cause}); make room. {what_is_left(self.partial)}"
            ) from error


class _Rows(Sampler[int]):
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


class _Moments(TrainerCallback):
    """When to log, evaluate, save and stop, besides every so many steps."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint brings its own intervals with it; they may change while a run goes on.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.progress.stepped(state.global_step)
        last = state.global_step == state.max_steps
        if state.global_step == 1 or last:
            control.should_log = True
        if last and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
        if self.trainer.stopped_by is not None:
            control.should_save = True
            control.should_training_stop = True


class StopSignals:
    """SIGTERM and Ctrl-C, remembered until a step is done. A second Ctrl-C ends a lone process at once."""

    def __init__(self, *, alone: bool) -> None:
        self.received: int | None = None
        self.alone = alone

    @contextmanager
    def caught(self) -> Iterator[None]:
        """While this lasts a signal is remembered and does nothing else. Only a main thread can catch signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._remember) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.received == signal.SIGINT == number and self.alone:
            raise KeyboardInterrupt
        self.received = self.received or number
