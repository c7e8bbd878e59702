"""What `ismdata train` reports while it works: one line per log, and progress after each step."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ismdata.display import Reporter
from ismdata.train.metrics import RunMetrics, peak_flops, training_flops


class SilentReporter:
    """Drops everything. Every process but the first has it, so that a run reports once."""

    def note(self, text: str) -> None:
        """Drop a line."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Drop a stage's progress."""


class TrainProgress:
    """Turns what the Trainer logs into lines for a reporter.

    Args:
        reporter: Receives a line per log, and the stage `train` after each step.
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

    def advance(self, step: int) -> None:
        """Report that `step` steps are done."""
        self.step = step
        self.reporter.progress("train", step, self.steps)

    def log(self, logs: Mapping[str, float]) -> None:
        """Report what the Trainer logs, as one line."""
        if "eval_loss" in logs:
            self.reporter.note(
                f"step {self.step}/{self.steps}  evaluation loss {logs['eval_loss']:.4f}  "
                f"token accuracy {logs['eval_token_accuracy']:.1%}"
            )
            return
        share = self.cost.utilisation(self.metrics)
        self.reporter.note(
            f"step {self.step}/{self.steps}  loss {logs['loss']:.4f}  "
            f"token accuracy {logs['token_accuracy']:.1%}  learning rate {logs['learning_rate']:.2e}  "
            f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['target_tokens_per_second']:,.0f} targets/s"
            f"{'' if share is None else f'  {share:.1%} MFU'}  {self._remaining()} left"
        )

    def _remaining(self) -> str:
        done = self.step - self.first_step
        seconds = self.metrics.elapsed() / max(done, 1) * (self.steps - self.step)
        return str(timedelta(seconds=round(seconds)))


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
