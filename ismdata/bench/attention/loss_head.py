"""Measure the loss of the targets, forward and backward: ours beside all logits, and beside torch's own chunks.

The gradients are those of the hidden states and of the head. Sizes are targets x width of the model x vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ismdata.bench.report import number
from ismdata.bench.timing import Lap, Outcome, Stopwatch, attempt, median_processor, median_seconds, peak_bytes, release
from ismdata.masks import IGNORE_INDEX
from ismdata.train import target_loss

#: Targets, width of the model and vocabulary, by device: short first runs with small models and real vocabularies, and
#: a micro-batch.
SIZES = {
    "cuda": ((1024, 576, 49_152), (4096, 2048, 128_256), (8192, 2048, 151_936)),
    "cpu": ((256, 128, 129_280), (256, 576, 49_152), (1024, 128, 4096), (1024, 576, 49_152)),
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _all_logits(rows: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(rows, head).float(), target, reduction="sum")


def _at_targets(rows: Tensor, head: Tensor, target: Tensor) -> Tensor:
    labels = functional.pad(target, (1, 0), value=IGNORE_INDEX)  # row t predicts token t + 1
    return target_loss(functional.pad(rows, (0, 0, 0, 1))[None], head, None, labels[None]).total


def _of_torch(rows: Tensor, head: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without any it computes all logits
    return functional.linear_cross_entropy(rows, head, target, reduction="sum", options=options)


#: The first one is what the others are compared with.
WAYS: dict[str, Loss] = {"all logits": _all_logits, "at targets": _at_targets, "torch's chunks": _of_torch}

#: A way that takes more seconds is measured once.
_SLOW = 2.0


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One way to compute the loss at one size. A value is None if `note` says why.

    Attributes:
        way: A name of WAYS.
        targets: Targets.
        width: Width of the hidden states.
        vocabulary: Rows of the head.
        seconds: Median seconds, forward and backward.
        processor: Processor seconds, on a CPU.
        peak_bytes: Peak of bytes in tensors beyond hidden states and head.
        ratio: Seconds divided by those of all logits.
        note: Why a value is missing.
        failed: Whether it failed unexpectedly.
        details: Every single time.
    """

    way: str
    targets: int
    width: int
    vocabulary: int
    seconds: float | None = None
    processor: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    note: str = ""
    failed: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        return (
            f"{self.targets:,} × {self.width:,} × {self.vocabulary:,}",
            self.way,
            _shown(self.seconds, 1e3, "ms"),
            _shown(self.processor, 1e3, "ms"),
            _shown(self.peak_bytes, 1 / 2**20, "MiB"),
            _shown(self.ratio, unit="×"),
            self.note,
        )

    def line(self) -> str:
        """The row as one line of text."""
        names = ("loss of", "", "", "processor", "peak", "all logits", "")
        return " · ".join(f"{name} {cell}".strip() for name, cell in zip(names, self.cells(), strict=True) if cell)

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


def _shown(value: float | None, scale: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{number(value * scale)} {unit}"


def loss_rows(device: torch.device, *, dtype: torch.dtype, rounds: int) -> Iterator[LossRow]:
    """Measure each way at each size of the device, the ways in alternation."""
    for size in SIZES[device.type]:
        yield from measure_size(*size, device=device, dtype=dtype, rounds=rounds)


def measure_size(
    targets: int, width: int, vocabulary: int, *, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[LossRow]:
    """Measure each way on the same random hidden states, head and targets."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    rows = normal(targets, width).requires_grad_()
    head = (normal(vocabulary, width) * 0.02).requires_grad_()
    target = torch.randint(vocabulary, (targets,), generator=generator, device=device)
    watch = Stopwatch(device)

    def once(loss: Loss) -> None:
        torch.autograd.grad(loss(rows, head, target), (rows, head))

    laps: dict[str, list[Lap]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    failures: dict[str, Outcome] = {}

    def warm_up(way: str) -> None:
        if WAYS[way] is _of_torch and not hasattr(functional, "linear_cross_entropy"):
            failures[way] = Outcome(reason=f"torch {torch.__version__} has no linear_cross_entropy")
            return
        once(WAYS[way])
        peaks[way] = peak_bytes(partial(once, WAYS[way]), device)

    def sample(way: str) -> None:
        if not (laps[way] and laps[way][0].seconds > _SLOW):
            laps[way] += watch.laps(partial(once, WAYS[way]))

    for work in (warm_up, *[sample] * rounds):
        for way in WAYS:
            if way not in failures:
                outcome = attempt(partial(work, way), device)
                if outcome.reason:
                    failures[way] = outcome
    release(device)
    base = median_seconds(laps["all logits"]) if "all logits" not in failures else None
    found = []
    for way in WAYS:
        failure = failures.get(way, Outcome())
        seconds = None if failure.reason else median_seconds(laps[way])
        found.append(
            LossRow(
                way=way,
                targets=targets,
                width=width,
                vocabulary=vocabulary,
                seconds=seconds,
                processor=None if failure.reason else median_processor(laps[way]),
                peak_bytes=peaks.get(way),
                ratio=None if seconds is None or base is None else seconds / base,
                note=failure.reason,
                failed=failure.unexpected,
                details={"laps": [vars(lap) for lap in laps[way]], "trace": failure.trace},
            )
        )
    return found
