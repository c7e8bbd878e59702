"""What `ismdata train` reports while it works: one line per log, and progress after each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ismdata.display import Reporter
from ismdata.train.metrics import RunMetrics, peak_flops, training_flops

#: The most columns of a line.
_COLUMNS = 80

#: Above this loss in nats, a perplexity is only a large number.
_LOSS_SHOWN = 20.0


class SilentReporter:
    """Drops everything. Every process but the first has it, so that a run reports once."""

    def note(self, text: str) -> None:
        """Drop a line."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Drop a stage's progress."""


class TrainProgress:
    """Turns what the Trainer logs into lines for a reporter.

    Args:
        reporter: Receives a line per log, and the stages `train` and `evaluate`.
        steps: Steps of the whole run.
        metrics: The run's sums, for the speed.
        cost: The model's operations, for the utilisation.
    """

    def __init__(self, reporter: Reporter, *, steps: int, metrics: RunMetrics, cost: Cost) -> None:
        self.reporter = reporter
        self.steps = steps
        self.metrics = metrics
        self.cost = cost
        self.first_step = self.step = 0

    def begin(self, step: int) -> None:
        """Start after `step` steps, which an interrupted run did."""
        self.first_step = self.step = step
        self.reporter.progress("train", step, self.steps)

    def advance(self, step: int) -> None:
        """Report that `step` steps are done."""
        self.step = step
        self.reporter.progress("train", step, self.steps)

    def evaluated(self, done: int, batches: int) -> None:
        """Report how many batches of the evaluation set are done."""
        self.reporter.progress("evaluate", done, batches)

    def log(self, logs: Mapping[str, float]) -> None:
        """Report what the Trainer logs, as one line."""
        step = f"step {self.step}/{self.steps}"
        if "eval_loss" in logs:
            accuracy = f"accuracy {logs['eval_token_accuracy']:.1%}"
            loss = f"loss {logs['eval_loss']:.4f}{self._perplexity(logs['eval_loss'])}"
            self.reporter.note(f"{step}  evaluation {loss}  {accuracy}")
            return
        share = self.cost.utilisation(self.metrics)
        parts = {
            "step": step,
            "loss": f"loss {logs['loss']:.4f}",
            "accuracy": f"accuracy {logs['token_accuracy']:.1%}",
            "learning rate": f"lr {logs['learning_rate']:.1e}",
            "speed": f"{compact(logs['tokens_per_second'])} tok/s",
            "utilisation": "" if share is None else f"{share:.0%} MFU",
            "remaining": f"{duration(self._remaining())} left" if self.step < self.steps else "",
        }
        self.reporter.note(one_line(parts, droppable=("learning rate", "utilisation")))

    def _perplexity(self, loss: float) -> str:
        return f", perplexity {math.exp(loss):,.2f}" if loss < _LOSS_SHOWN else ""

    def _remaining(self) -> float:
        """Seconds of training that remain; evaluations and checkpoints come on top."""
        done = self.step - self.first_step
        return self.metrics.elapsed() / max(done, 1) * (self.steps - self.step)


def one_line(parts: Mapping[str, str], *, droppable: Sequence[str]) -> str:
    """Join the parts that are not empty; while the line is longer than 80 columns, drop those of `droppable` in turn.

    >>> one_line({"step": "step 1", "speed": "", "left": "9 s left"}, droppable=())
    'step 1  9 s left'
    """
    kept = {name: part for name, part in parts.items() if part}
    for name in droppable:
        if len("  ".join(kept.values())) > _COLUMNS:
            kept.pop(name, None)
    return "  ".join(kept.values())


def compact(count: float) -> str:
    """A number with three digits.

    >>> compact(87.4), compact(12_345), compact(1_234_567), compact(999_999)
    ('87', '12.3k', '1.23M', '1.00M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{count:.3g}") >= size:
            return f"{count / size:#.3g}".rstrip(".") + letter
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(9), duration(425), duration(8100), duration(200_000)
    ('9 s', '7:05', '2 h 15', '2 d 7 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, days = minutes // 60, minutes // (60 * 24)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


class Cost:
    """The model's floating-point operations, from which the model FLOP utilisation (MFU) follows.

    Args:
        model: The model to train.
        processes: Processes that train, each on a GPU of its own.
    """

    def __init__(self, model: PreTrainedModel, *, processes: int) -> None:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        embedding = model.get_input_embeddings()
        head_weight = getattr(head, "weight", None)
        outside = {id(getattr(part, "weight", None)) for part in (head, embedding)}
        inner = [parameter for parameter in model.parameters() if id(parameter) not in outside]
        config = model.config.get_text_config()
        self.sizes: dict[str, int] = {
            "trained": sum(parameter.numel() for parameter in inner if parameter.requires_grad),
            "frozen": sum(parameter.numel() for parameter in inner if not parameter.requires_grad),
            "head": head_weight.numel() if isinstance(head_weight, nn.Parameter) else 0,
            "layers": int(config.num_hidden_layers),
            "width": int(config.num_attention_heads * _head_width(config)),
        }
        self.peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.processes = processes

    def utilisation(self, metrics: RunMetrics) -> float | None:
        """Operations done as a share of the GPUs' peak; None for an unknown peak."""
        if self.peak is None:
            return None
        flops = training_flops(**self.sizes, **metrics.since_start())
        return flops / metrics.elapsed() / (self.peak * self.processes)


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
