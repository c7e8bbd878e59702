"""What `ismdata train` says while it works: lines, and a bar on a terminal; the first process alone speaks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ismdata.distributed import is_first_process
from ismdata.train.metrics import RunMetrics, peak_flops, training_flops


class TrainProgress:
    """Call it with what the Trainer logs. say: where lines go; a terminal gets a bar beside them."""

    def __init__(self, say: Callable[[str], None], *, steps: int, metrics: RunMetrics, cost: Cost) -> None:
        self.say = say
        self.steps = steps
        self.metrics = metrics
        self.cost = cost
        self.step = 0
        self._advance: Callable[[int, str], None] | None = None

    @contextmanager
    def shown(self, first_step: int) -> Iterator[None]:
        """While this lasts there is a bar, where standard error is a terminal."""
        self.first_step = self.step = first_step
        if not (sys.stderr.isatty() and is_first_process()):
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("train", total=self.steps, completed=first_step, said="")

            def advance(step: int, said: str) -> None:
                bar.update(task, completed=step, said=said)

            self._advance, say = advance, self.say
            self.say = lambda line: bar.console.print(line, highlight=False, markup=False)
            try:
                yield
            finally:
                self._advance, self.say = None, say

    def stepped(self, step: int) -> None:
        """A step is done."""
        self.step = step
        if self._advance is not None:
            tokens, targets = self.metrics.speed()
            self._advance(step, f"{tokens:,.0f} tokens/s, {targets:,.0f} targets/s{self._utilisation()}")

    def __call__(self, logs: Mapping[str, float]) -> None:
        if not is_first_process():
            return
        if "eval_loss" in logs:
            self.say(f"step {self.step}/{self.steps}  evaluation loss {logs['eval_loss']:.4f}")
            return
        self.say(
            f"step {self.step}/{self.steps}  loss {logs['loss']:.4f}  learning rate {logs['learning_rate']:.2e}  "
            f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['target_tokens_per_second']:,.0f} targets/s"
            f"{self._utilisation()}  {self._remaining()} left"
        )

    def _remaining(self) -> str:
        done = self.step - self.first_step
        seconds = self.metrics.elapsed() / max(done, 1) * (self.steps - self.step)
        return str(timedelta(seconds=round(seconds)))

    def _utilisation(self) -> str:
        share = self.cost.utilisation(self.metrics)
        return "" if share is None else f"  {share:.1%} MFU"


class Cost:
    """What the model's arithmetic costs, to tell how much of the cards' is used (model FLOP utilisation)."""

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
        """Operations done as a share of those the cards could have done; None where their speed is not known."""
        if self.peak is None:
            return None
        flops = training_flops(**self.sizes, **metrics.since_start())
        return flops / metrics.elapsed() / (self.peak * self.processes)


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
