"""Seconds and bytes of work on a device: CUDA events and the allocator's peak there, the clock and torch's own record
of allocations on a CPU.
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

#: Products of two such matrices keep a GPU busy for some milliseconds: the time in which Python queues what follows.
_LEAD_SIZE, _LEAD_PRODUCTS = 8192, 4


@dataclass(frozen=True, kw_only=True)
class Lap:
    """What a piece of work took. `processor`: seconds of all threads of this process together, on a CPU; it moves less
    than the clock where others use the machine.
    """

    seconds: float
    processor: float | None = None


class Stopwatch:
    """Takes the time of each of several pieces of work that follow each other on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lead: torch.Tensor | None = None
        if device.type == "cuda":
            self._lead = torch.randn(_LEAD_SIZE, _LEAD_SIZE, device=device, dtype=torch.bfloat16)

    def laps(self, *work: Callable[[], object], repeat: int = 1) -> list[Lap]:
        """The mean of each piece over `repeat` turns of all pieces in order.

        On CUDA nothing waits in between: the device first gets a few milliseconds of other work, so that it finds all
        kernels queued and gaps in which Python prepares the next one do not count. A piece that synchronises counts
        whole.
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
    """Python collects no garbage meanwhile, as it would now and then in one of the pieces."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def median_seconds(laps: Sequence[Lap]) -> float | None:
    """None where there are no laps."""
    return statistics.median(lap.seconds for lap in laps) if laps else None


def median_processor(laps: Sequence[Lap]) -> float | None:
    """None where there are no laps, or the work was a GPU's."""
    known = [lap.processor for lap in laps if lap.processor is not None]
    return statistics.median(known) if known else None


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors held while `work` ran, beyond those that were there when it began."""
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
    """The highest sum of allocations less releases, in the order of time; what was there before is released for free.

    Releases of memory that was taken before the record began are known by an address that was never taken in it.
    """
    held: dict[int, int] = {}
    total = most = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        address, size = int(event["args"]["Addr"]), int(event["args"]["Bytes"])
        if size > 0:
            held[address] = size
            total += size
            most = max(most, total)
        else:
            total -= held.pop(address, 0)
    return most


def release(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a piece of work ended. `reason`: empty where it went well. `unexpected`: all but a lack of memory. `trace`:
    the traceback of what was unexpected.
    """

    reason: str = ""
    unexpected: bool = False
    trace: str = ""


def attempt(work: Callable[[], object], device: torch.device) -> Outcome:
    """Do the work; what goes wrong becomes a reason in one line, so that the rest is measured all the same."""
    try:
        work()
    except Exception as error:  # kernels and compilers raise anything; the row says what
        outcome = _outcome(error)
    else:
        return Outcome()
    release(device)  # after the exception is gone, whose frames hold tensors
    return outcome


def _outcome(error: Exception) -> Outcome:
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Outcome(reason=f"out of memory: {first}")
    trace = "".join(traceback.format_exception(error))
    return Outcome(reason=f"failed: {type(error).__name__}: {first}", unexpected=True, trace=trace)
