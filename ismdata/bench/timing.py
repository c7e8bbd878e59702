"""Measure seconds and bytes of work on a device.

On CUDA: events, and the allocator's peak. On a CPU: the clock, and the profiler's record of allocations.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ismdata.choices import check_choice
from ismdata.errors import UsageError

#: Side of two matrices, and how often they are multiplied: this keeps a GPU busy for a few milliseconds while Python
#: queues the work to measure.
_LEAD_SIZE, _LEAD_PRODUCTS = 8192, 4


def find_device(name: str) -> torch.device:
    """Find the device to measure on.

    Args:
        name: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Raises:
        UsageError: If the name is another one, or there is no GPU for `cuda`.
    """
    check_choice("--device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device. Use --device cpu, or check nvidia-smi")
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Lap:
    """How long a piece of work took.

    Attributes:
        seconds: By the clock, or by CUDA events.
        processor: Processor time of all threads of this process, on a CPU only. It varies less than the clock when
            other processes use the machine.
    """

    seconds: float
    processor: float | None = None


class Stopwatch:
    """Measures several pieces of work that run one after another on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lead: torch.Tensor | None = None
        if device.type == "cuda":
            self._lead = torch.randn(_LEAD_SIZE, _LEAD_SIZE, device=device, dtype=torch.bfloat16)

    def laps(self, *work: Callable[[], object], repeat: int = 1) -> list[Lap]:
        """Run all pieces in order, `repeat` times, and return the mean time of each.

        On CUDA the device first gets a few milliseconds of other work. All kernels are queued by then, so the time
        Python needs to prepare the next kernel does not count, unless a piece synchronizes.
        """
        with _no_collection():
            return self._on_cpu(work, repeat) if self._lead is None else self._on_gpu(self._lead, work, repeat)

    def _on_cpu(self, work: Sequence[Callable[[], object]], repeat: int) -> list[Lap]:
        totals = [(0.0, 0.0)] * len(work)
        for _ in range(repeat):
            for at, piece in enumerate(work):
                started, busy = time.perf_counter(), time.process_time()
                piece()
                seconds, processor = totals[at]
                totals[at] = (seconds + time.perf_counter() - started, processor + time.process_time() - busy)
        return [Lap(seconds=seconds / repeat, processor=processor / repeat) for seconds, processor in totals]

    def _on_gpu(self, lead: torch.Tensor, work: Sequence[Callable[[], object]], repeat: int) -> list[Lap]:
        marks = [[_mark() for _ in range(len(work) + 1)] for _ in range(repeat)]
        torch.cuda.synchronize(self.device)
        for _ in range(_LEAD_PRODUCTS):
            torch.mm(lead, lead)
        for turn in marks:
            turn[0].record()
            for piece, mark in zip(work, turn[1:], strict=True):
                piece()
                mark.record()
        torch.cuda.synchronize(self.device)
        return [
            Lap(seconds=sum(turn[at].elapsed_time(turn[at + 1]) for turn in marks) / repeat / 1000)
            for at in range(len(work))
        ]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection, which would otherwise run during some of the pieces."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def median_seconds(laps: Sequence[Lap]) -> float | None:
    """The median time; None without laps."""
    return statistics.median(lap.seconds for lap in laps) if laps else None


def median_processor(laps: Sequence[Lap]) -> float | None:
    """The median processor time; None without laps or on a GPU."""
    known = [lap.processor for lap in laps if lap.processor is not None]
    return statistics.median(known) if known else None


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The peak of bytes in tensors while `work` runs, beyond those that existed before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write two lines to stderr each time
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _peak([event for event in events if event.get("name") == "[memory]"])


def _peak(events: Sequence[dict[str, Any]]) -> int:
    """The highest sum of allocations minus releases, in the order of time.

    A release counts only if its address was allocated in the record: other memory existed before.
    """
    allocated: dict[int, int] = {}
    total = most = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        address, size = int(event["args"]["Addr"]), int(event["args"]["Bytes"])
        if size > 0:
            allocated[address] = size
            total += size
            most = max(most, total)
        else:
            total -= allocated.pop(address, 0)
    return most


def release(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a piece of work ended.

    Attributes:
        reason: Why it failed; empty if it succeeded.
        unexpected: Whether it failed for another reason than a lack of memory.
        trace: The traceback of an unexpected failure.
    """

    reason: str = ""
    unexpected: bool = False
    trace: str = ""


def attempt(work: Callable[[], object], device: torch.device) -> Outcome:
    """Run `work`. A failure becomes a reason in one line, so that the other measurements still run."""
    try:
        work()
    except Exception as error:  # kernels and compilers raise any type; the row gives the reason
        outcome = _outcome(error)
    else:
        return Outcome()
    release(device)  # only now: the frames of the exception hold tensors
    return outcome


def _outcome(error: Exception) -> Outcome:
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Outcome(reason=f"out of memory: {first}")
    trace = "".join(traceback.format_exception(error))
    return Outcome(reason=f"failed: {type(error).__name__}: {first}", unexpected=True, trace=trace)
