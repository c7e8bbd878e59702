"""`ismdata bench attention`: measure each backend under each mask beside plain causal FlashAttention on this device.

Each length has one batch of documents with the lengths of ShareGPT (`workload.py`), the same for all backends. What is
measured is the core of an attention layer: queries, keys and values to the output, and the gradients of the three.
FLOPs count visible pairs only: 4 x width x heads per pair forward, 2.5 times that backward. Each case is warmed up,
then all cases of a length run in alternation, round after round, and the medians count. Training steps follow
(`training_steps.py`), and the loss of the targets (`loss_head.py`). What cannot run becomes a row that says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ismdata.attention import BACKENDS
from ismdata.bench.attention import yardstick
from ismdata.bench.attention.cases import YARDSTICK, Case, Heads, case, missing, random_inputs
from ismdata.bench.attention.loss_head import LossRow, loss_rows
from ismdata.bench.attention.report import AttentionRow, StepRow, picture
from ismdata.bench.attention.training_steps import training_steps
from ismdata.bench.attention.workload import Workload, sharegpt_like
from ismdata.bench.report import machine
from ismdata.bench.timing import (
    Lap,
    Outcome,
    Stopwatch,
    attempt,
    find_device,
    median_processor,
    median_seconds,
    peak_bytes,
    release,
)
from ismdata.choices import MASKS
from ismdata.data import open_output
from ismdata.display import LOGGED, Reporter
from ismdata.errors import UsageError
from ismdata.masks import BLOCK_SIZE

RESULTS_NAME, PICTURE_NAME = "bench.json", "bench.svg"
PARTS = ("attention", "step", "loss")

#: Defaults by device: sequence lengths, attention heads (those of a Llama of 1 B on a GPU, a quarter of them on a CPU),
#: rounds, and precision.
SEQ_LENS = {"cuda": (2048, 8192, 32768), "cpu": (512, 1024, 2048)}
HEADS = {"cuda": Heads(heads=32, kv_heads=8, width=64), "cpu": Heads(heads=8, kv_heads=2, width=64)}
ROUNDS = {"cuda": 5, "cpu": 3}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}

BACKWARD_FLOPS = 2.5
#: A sample repeats its case until it takes this many seconds, but at most this often.
_SAMPLE_SECONDS, _MOST_REPEATS = 0.02, 20


@dataclass(kw_only=True)
class _Run:
    """A case while it is measured: what it needs, and its times per round."""

    backend: str
    mask: str
    case: Case | None = None
    prepared: Any = None
    repeat: int = 1
    peak_bytes: int | None = None
    forward: list[Lap] = field(default_factory=list)
    backward: list[Lap] = field(default_factory=list)
    first: list[Lap] = field(default_factory=list)
    note: str = ""
    failed: bool = False
    trace: str = ""

    def warm_up(self, make: Callable[[], Case], watch: Stopwatch) -> None:
        """Compile kernels, measure the peak of memory, and decide how often a sample repeats the case."""
        made = make()
        made.once()
        self.peak_bytes = peak_bytes(made.once, watch.device)
        self.prepared = made.prepare()
        made.forward(self.prepared)
        (lap,) = watch.laps(made.once)
        self.repeat = max(1, min(_MOST_REPEATS, int(_SAMPLE_SECONDS / lap.seconds)))
        self.case, self.note = made, made.forward_only or ""

    def sample(self, watch: Stopwatch) -> None:
        """One round: forward and backward with the prepared tables, then the first forward of a new micro-batch."""
        made = self.case
        assert made is not None
        output: list[torch.Tensor] = []

        def forward() -> None:
            output[:] = [made.forward(self.prepared)]

        work: list[Callable[[], object]] = [forward]
        if made.forward_only is None:
            work.append(lambda: made.backward(output.pop()))
        laps = watch.laps(*work, repeat=self.repeat)
        self.forward.append(laps[0])
        self.backward += laps[1:]
        self.first += watch.laps(lambda: made.forward(made.prepare()))

    def laps(self) -> dict[str, list[Lap]]:
        return {"forward": self.forward, "backward": self.backward, "first": self.first}

    def record_failure(self, outcome: Outcome, device: torch.device) -> None:
        self.note, self.failed, self.trace = outcome.reason, outcome.unexpected, outcome.trace
        self.case = self.prepared = None
        release(device)


def measure_length(
    seq_len: int,
    *,
    rows: int,
    heads: Heads,
    device: torch.device,
    dtype: torch.dtype,
    backends: Sequence[str],
    rounds: int,
) -> list[AttentionRow]:
    """Measure the yardstick and each backend under each mask on one batch of `rows` x `seq_len` tokens."""
    workload = sharegpt_like(seq_len, rows=rows)
    inputs = random_inputs(workload, heads, device, dtype)
    watch = Stopwatch(device)
    runs = [_Run(backend=YARDSTICK, mask="causal")]
    runs += [_Run(backend=name, mask=mask) for name in backends for mask in MASKS]

    def guarded(run: _Run, work: Callable[[], object]) -> None:
        outcome = attempt(work, device)
        if outcome.reason:
            run.record_failure(outcome, device)

    for run in runs:
        reason = missing(run.backend, device)
        if reason is not None:
            run.record_failure(Outcome(reason=reason), device)
            continue
        guarded(run, partial(run.warm_up, partial(case, run.backend, run.mask, workload, inputs), watch))
    for _ in range(rounds):
        for run in runs:
            if run.case is not None:
                guarded(run, partial(run.sample, watch))
    return [_row(run, workload, heads, base=runs[0]) for run in runs]


def _row(run: _Run, workload: Workload, heads: Heads, *, base: _Run) -> AttentionRow:
    forward, backward, first = (median_seconds(laps) for laps in (run.forward, run.backward, run.first))
    base_forward = median_seconds(base.forward)
    total, base_total = _sum(forward, backward), _sum(base_forward, median_seconds(base.backward))
    flops = 4 * heads.width * heads.heads * workload.visible_pairs(run.mask)
    return AttentionRow(
        backend=run.backend,
        mask=run.mask,
        seq_len=workload.seq_len,
        rows=workload.rows,
        pairs=workload.visible_pairs(run.mask),
        forward=forward,
        backward=backward,
        once=None if first is None or forward is None else max(0.0, first - forward),
        forward_tflops=_rate(flops, forward),
        backward_tflops=_rate(BACKWARD_FLOPS * flops, backward),
        tflops=_rate((1 + BACKWARD_FLOPS) * flops, total),
        peak_bytes=run.peak_bytes,
        ratio=_ratio(total, base_total),
        forward_ratio=_ratio(forward, base_forward),
        processor=_sum(median_processor(run.forward), median_processor(run.backward) if run.backward else 0.0),
        note=run.note,
        failed=run.failed,
        details={
            **{name: [vars(lap) for lap in laps] for name, laps in run.laps().items()},
            "repeat": run.repeat,
            "trace": run.trace,
        },
    )


def _sum(forward: float | None, backward: float | None) -> float | None:
    return None if forward is None or backward is None else forward + backward


def _ratio(ours: float | None, base: float | None) -> float | None:
    return None if ours is None or base is None else ours / base


def _rate(flops: float, seconds: float | None) -> float | None:
    return None if seconds is None else flops / seconds / 1e12


def device_facts(device: torch.device) -> dict[str, Any]:
    """Describe the device: name, capability, memory and CUDA version of a GPU, or the threads of a CPU."""
    if device.type != "cuda":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def parse_seq_lens(text: str | None, device: torch.device) -> tuple[int, ...]:
    """Parse lengths such as 2048,8192; None gives those of the device. Raises UsageError."""
    if text is None:
        return SEQ_LENS[device.type]
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) == 0 or int(word) % BLOCK_SIZE:
            raise UsageError(
                f"--seq-len {text}: expected multiples of {BLOCK_SIZE} separated by commas, e.g. 2048,8192"
            )
    return tuple(dict.fromkeys(int(word) for word in words))


def run_attention_bench(
    output: Path,
    *,
    seq_lens: str | None = None,
    rounds: int | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter = LOGGED,
) -> dict[str, Any]:
    """Measure attention, training steps and the loss; write `bench.json` and `bench.svg`.

    Args:
        output: Folder to write.
        seq_lens: Tokens per sequence, separated by commas. None: SEQ_LENS.
        rounds: How often each case is measured. None: ROUNDS.
        only: Names of PARTS and of backends; all of them if empty.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        overwrite: Replace what `output` holds.
        reporter: Gets each row as a note when it is measured.

    Returns:
        What `bench.json` holds.

    Raises:
        UsageError: If an argument is not allowed, or `output` is in use.
        DataError: If `output` cannot be written.
    """
    unknown = [name for name in only if name not in (*PARTS, *BACKENDS)]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: expected one of {', '.join((*PARTS, *BACKENDS))}")
    where = find_device(device)
    rounds = ROUNDS[where.type] if rounds is None else rounds
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: expected 1 or more")
    lengths = parse_seq_lens(seq_lens, where)
    parts = [part for part in PARTS if part in only] or list(PARTS)
    backends = [name for name in BACKENDS if name in only] or list(BACKENDS)
    rows: list[AttentionRow | StepRow | LossRow] = []
    with open_output(output, overwrite=overwrite, marker=RESULTS_NAME, reporter=reporter) as folder:
        for row in _rows(parts, lengths, backends=backends, device=where, rounds=rounds):
            rows.append(row)
            reporter.note(row.line())
        results = {
            "machine": machine(),
            "device": device_facts(where),
            "options": {
                "seq_lens": list(lengths),
                "rounds": rounds,
                "dtype": str(DTYPES[where.type]).removeprefix("torch."),
                "heads": vars(HEADS[where.type]),
                "yardstick": yardstick.name(where),
            },
            "attention": [row.as_json() for row in rows if isinstance(row, AttentionRow)],
            "steps": [row.as_json() for row in rows if isinstance(row, StepRow)],
            "losses": [row.as_json() for row in rows if isinstance(row, LossRow)],
        }
        (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / PICTURE_NAME).write_text(picture(results), encoding="utf-8")
    return results


def _rows(
    parts: Sequence[str], lengths: Sequence[int], *, backends: Sequence[str], device: torch.device, rounds: int
) -> Iterator[AttentionRow | StepRow | LossRow]:
    """Measure all parts. All batches have as many tokens as the longest row, so they differ only in length."""
    if "attention" in parts:
        for seq_len in lengths:
            yield from measure_length(
                seq_len,
                rows=max(lengths) // seq_len,
                heads=HEADS[device.type],
                device=device,
                dtype=DTYPES[device.type],
                backends=backends,
                rounds=rounds,
            )
    if "step" in parts:
        yield from training_steps(device, backends=backends, rounds=rounds)
    if "loss" in parts:
        yield from loss_rows(device, dtype=DTYPES[device.type], rounds=rounds)
