"""The metrics of a run: `metrics.csv`, the running sums between two of its lines, and the curves drawn from it.

A checkpoint holds all of it. A resumed run therefore writes the same lines as an uninterrupted one, but for the
seconds.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ismdata.choices import MASK_COLOURS

METRICS_NAME = "metrics.csv"
PROGRESS_NAME = "progress.json"
CURVES_NAME = "curves.png"
METRICS = (
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "target_tokens",
    "seconds",
    "eval_loss",
    "token_accuracy",
    "eval_token_accuracy",
)

#: Peak of dense bfloat16 operations per second, as the makers state it, by a part of the GPU's name.
_PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass
class Sums:
    """The running sums of a run.

    `pairs` counts pairs of a row and a key that it sees. `seconds` are those of the steps, without evaluations and
    checkpoints. `window_…` count since the last line of metrics.csv. `evaluation_due`: a signal kept the run from
    evaluating after its last step.
    """

    tokens: int = 0
    target_tokens: int = 0
    pairs: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_steps: int = 0
    window_correct: int = 0
    window_targets: int = 0
    evaluation_due: bool = False


class RunMetrics:
    """The metrics of a run in `folder`. All processes keep the sums; only the first one writes files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_NAME
        self.sums = Sums()
        self._began = self._started = time.monotonic()
        self._before = Sums()

    def begin(self, checkpoint: Path | None, *, write: bool) -> None:
        """Start the clock.

        Args:
            checkpoint: The checkpoint to take the sums from, if the run is resumed.
            write: Whether to write metrics.csv too: the checkpoint's, or an empty one.
        """
        if checkpoint is not None:
            self.sums = Sums(**json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8")))
        if write and checkpoint is not None:
            self._copy_lines(checkpoint / METRICS_NAME)
        elif write:
            self.path.write_text(",".join(METRICS) + "\n", encoding="utf-8")
        self._before = replace(self.sums)
        self._began = time.monotonic()
        self._started = self._began - self.sums.seconds

    def _copy_lines(self, path: Path) -> None:
        """Copy a checkpoint's metrics.csv; one of an older version has fewer columns."""
        with (
            path.open(encoding="utf-8", newline="") as source,
            self.path.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, METRICS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(csv.DictReader(source))

    def add_step(self, *, loss: float, correct: int, tokens: int, target_tokens: int, pairs: int) -> None:
        """Add a step: its loss, which is the mean over its items, and its counts over all processes.

        `correct` counts the targets that were the model's most likely token.
        """
        self.sums.tokens += tokens
        self.sums.target_tokens += target_tokens
        self.sums.pairs += pairs
        self.sums.window_loss += loss
        self.sums.window_steps += 1
        self.sums.window_correct += correct
        self.sums.window_targets += target_tokens
        self.sums.seconds = time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context the clock stands still."""
        began = time.monotonic()
        try:
            yield
        finally:
            lasted = time.monotonic() - began
            self._began += lasted
            self._started += lasted

    def elapsed(self) -> float:
        """Seconds of training since this process started to train."""
        return max(time.monotonic() - self._began, 1e-9)

    def since_start(self) -> dict[str, int]:
        """Tokens, target tokens and pairs since this process started to train."""
        names = ("tokens", "target_tokens", "pairs")
        return {name: getattr(self.sums, name) - getattr(self._before, name) for name in names}

    def speed(self) -> tuple[float, float]:
        """Tokens per second and target tokens per second since this process started to train."""
        counts = self.since_start()
        return counts["tokens"] / self.elapsed(), counts["target_tokens"] / self.elapsed()

    def close_window(self) -> tuple[float, float]:
        """The mean loss over the steps since the last call, and the token accuracy over their targets."""
        sums = self.sums
        means = sums.window_loss / max(sums.window_steps, 1), sums.window_correct / max(sums.window_targets, 1)
        self.sums = replace(sums, window_loss=0.0, window_steps=0, window_correct=0, window_targets=0)
        return means

    def line(self, step: int, **values: float) -> None:
        """Append a line to metrics.csv. `values` are by column."""
        row: dict[str, Any] = {"step": step, "seconds": round(self.sums.seconds, 3), **values}
        if "loss" in values:
            row |= {"tokens": self.sums.tokens, "target_tokens": self.sums.target_tokens}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, METRICS, lineterminator="\n").writerow(row)

    def save(self, checkpoint: Path) -> None:
        """Write the sums and metrics.csv into a checkpoint."""
        (checkpoint / PROGRESS_NAME).write_text(json.dumps(asdict(self.sums)) + "\n", encoding="utf-8")
        shutil.copyfile(self.path, checkpoint / METRICS_NAME)


def read_column(path: Path, name: str) -> list[tuple[int, float]]:
    """The steps and values of one column of a metrics.csv, without the lines where it is empty."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def training_flops(
    *, trained: int, frozen: int, head: int, layers: int, width: int, tokens: int, target_tokens: int, pairs: int
) -> float:
    """The floating-point operations that training steps require; recomputed activations are not counted.

    A parameter costs 2 operations per token forward, 2 for the gradient of its input and, if it is trained, 2 for its
    own. A layer costs 4 x width per pair of a row and a key forward, and twice that backward.

    Args:
        trained: Trained parameters in matrix products below the output head.
        frozen: Frozen ones.
        head: Parameters of the output head, which sees targets only.
        layers: Attention layers.
        width: Heads x width of a head.
        tokens: Tokens seen.
        target_tokens: Targets seen.
        pairs: Pairs of a row and a key that it sees.

    Returns:
        The number of operations.

    >>> training_flops(trained=10, frozen=0, head=5, layers=1, width=2, tokens=3, target_tokens=2, pairs=6)
    384.0
    """
    products = (6 * trained + 4 * frozen) * tokens + 6 * head * target_tokens
    return float(products + 12 * layers * width * pairs)


def peak_flops(device_name: str) -> float | None:
    """The peak of dense bfloat16 operations per second of a GPU; None for an unknown one."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in device_name), None)


def draw_curves(folder: Path, mask: str) -> bool:
    """Draw loss, gradient norm and learning rate from `folder`'s metrics.csv into its curves.png.

    Args:
        folder: The folder.
        mask: The mask that the model was trained under, which has a colour of its own in all pictures.

    Returns:
        False if matplotlib is not installed (pip install 'ismdata[plots]'); nothing is drawn then.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    path = folder / METRICS_NAME
    for panel, names in zip(panels, (("loss", "eval_loss"), ("grad_norm",), ("learning_rate",)), strict=True):
        for name in names:
            points = read_column(path, name)
            if points:
                steps, values = zip(*points, strict=True)
                evaluated = name == "eval_loss"
                panel.plot(
                    steps,
                    values,
                    label=f"evaluation, {mask}" if evaluated else f"training, {mask}",
                    color=MASK_COLOURS[mask],
                    linestyle="--" if evaluated else "-",
                    marker="o" if evaluated or len(points) < 30 else None,
                    markersize=5 if evaluated else 3,
                    markerfacecolor="white" if evaluated else MASK_COLOURS[mask],
                    linewidth=1.2,
                )
        panel.set_ylabel(names[0].replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0].legend()
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(folder / CURVES_NAME, dpi=120)
    return True
