"""Report `ismdata bench attention`: rows of two kinds, a table of each, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table

from ismdata.bench.attention.loss_head import LossRow
from ismdata.bench.report import machine_line, number, svg_text
from ismdata.display import View

_WIDTH, _ROW, _LABEL, _BAR, _TOP = 1140, 24, 190, 420, 66
#: Of backends; none is that of a mask.
_COLOURS = {"yardstick": "#b9bec6", "sdpa": "#b4553f", "flex": "#3f8f6b", "varlen": "#2f4b57"}
_OTHER_COLOUR = "#8c8c4a"


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One backend, or the yardstick, under one mask at one length. A value is None if `note` says why.

    Attributes:
        backend: A name of the registry, or `yardstick`.
        mask: `ism`, `causal` or `prefix`.
        seq_len: Tokens per row.
        rows: Rows of the batch.
        pairs: Visible pairs of query and key in the batch.
        forward: Median seconds of a layer's core, forward.
        backward: Median seconds of its backward pass.
        once: Additional seconds of the first layer of a micro-batch.
        forward_tflops: TFLOP/s forward, counting visible pairs only; likewise the next two.
        backward_tflops: TFLOP/s backward.
        tflops: TFLOP/s of both.
        peak_bytes: Peak of bytes in tensors beyond queries, keys and values; the mask is included.
        ratio: Seconds forward + backward divided by the yardstick's.
        forward_ratio: The same for forward alone.
        processor: Processor seconds forward + backward, on a CPU.
        note: Why a value is missing.
        failed: Whether the case failed unexpectedly.
        details: Every single time.
    """

    backend: str
    mask: str
    seq_len: int
    rows: int
    pairs: int
    forward: float | None = None
    backward: float | None = None
    once: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    tflops: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    forward_ratio: float | None = None
    processor: float | None = None
    note: str = ""
    failed: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        return (
            f"{self.seq_len:,} × {self.rows}",
            self.backend,
            self.mask,
            _shown(self.forward, 1e3, "ms"),
            _shown(self.backward, 1e3, "ms"),
            _shown(self.once, 1e3, "ms"),
            rate(self.forward_tflops),
            rate(self.backward_tflops),
            _shown(self.processor, 1e3, "ms"),
            _shown(self.peak_bytes, 1 / 2**20, "MiB"),
            _shown(self.ratio, unit="×") or _shown(self.forward_ratio, unit="× forward"),
            self.note,
        )

    def line(self) -> str:
        """The row as one line of text."""
        names = (
            "T",
            "",
            "",
            "forward",
            "backward",
            "once",
            "forward",
            "backward",
            "processor",
            "peak",
            "yardstick",
            "",
        )
        cells = zip(names, self.cells(), strict=True)
        return " · ".join(f"{name} {cell}".strip() for name, cell in cells if cell)

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A training step of one model under one backend and mask; `ratio` compares it with the causal step."""

    model: str
    backend: str
    mask: str
    seq_len: int
    rows: int
    seconds: float | None = None
    tokens_per_second: float | None = None
    processor: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    note: str = ""
    failed: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        return (
            self.model,
            f"{self.seq_len:,} × {self.rows}",
            self.backend,
            self.mask,
            _shown(self.seconds, 1e3, "ms"),
            _shown(self.processor, 1e3, "ms"),
            _shown(self.tokens_per_second),
            _shown(self.peak_bytes, 1 / 2**20, "MiB"),
            _shown(self.ratio, unit="×"),
            self.note,
        )

    def line(self) -> str:
        """The row as one line of text."""
        names = ("step of", "T", "", "", "", "processor", "tokens/s", "peak", "causal", "")
        return " · ".join(f"{name} {cell}".strip() for name, cell in zip(names, self.cells(), strict=True) if cell)

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


def _shown(value: float | None, scale: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{number(value * scale)} {unit}".strip()


def rate(tflops: float | None) -> str:
    """Format TFLOP/s; small values in GFLOP/s.

    >>> rate(313.4), rate(0.0337)
    ('313 TFLOP/s', '33.7 GFLOP/s')
    """
    if tflops is None:
        return ""
    if tflops >= 100:
        return f"{tflops:.0f} TFLOP/s"
    return f"{number(tflops)} TFLOP/s" if tflops >= 1 else f"{number(tflops * 1000)} GFLOP/s"


def device_line(results: dict[str, Any]) -> str:
    """The device and the shape of the layer in one line."""
    device, options = results["device"], results["options"]
    heads = options["heads"]
    where = f"{device['name']}, {device['threads']} threads" if "threads" in device else device["name"]
    return (
        f"{where}; {options['dtype']}, {heads['heads']} heads, {heads['kv_heads']} of keys, width {heads['width']}; "
        f"yardstick: {options['yardstick']}"
    )


def attention_table(results: dict[str, Any]) -> View:
    """Show the results of `ismdata bench attention`.

    Args:
        results: What `bench.json` holds.

    Returns:
        The results as a JSON object, and tables for the terminal.
    """
    drawings = []
    title = f"{device_line(results)}\n{machine_line(results['machine'])}"
    if results["attention"]:
        columns = (
            "T × rows",
            "backend",
            "mask",
            "forward",
            "backward",
            "once",
            "rate forward",
            "backward",
            "processor",
            "peak",
        )
        rows = [AttentionRow(**row).cells() for row in results["attention"]]
        drawings.append(_table(title, (*columns, "× yardstick", "note"), rows, left=(1, 2, 11)))
    if results["steps"]:
        columns = (
            "step of",
            "T × rows",
            "backend",
            "mask",
            "step",
            "processor",
            "tokens/s",
            "peak",
            "× causal",
            "note",
        )
        rows = [StepRow(**row).cells() for row in results["steps"]]
        drawings.append(_table("" if drawings else title, columns, rows, left=(0, 2, 3, 9)))
    if results["losses"]:
        of_losses = ("targets × width × vocabulary", "loss", "forward + backward", "processor", "peak", "× all", "note")
        cells = [LossRow(**row).cells() for row in results["losses"]]
        drawings.append(_table("" if drawings else title, of_losses, cells, left=(1, 6)))
    return View(facts=results, drawing=Group(*drawings))


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], *, left: tuple[int, ...]) -> Table:
    drawing = Table(title=title, title_justify="left", title_style="dim")
    for number_, name in enumerate(columns):
        drawing.add_column(name, justify="left" if number_ in left else "right")
    for row in rows:
        drawing.add_row(*row)
    return drawing


def picture(results: dict[str, Any]) -> str:
    """Draw an SVG: a panel per length with a bar per row, and the training steps below.

    A bar's length is the rate, counting visible pairs only; a dashed line marks the yardstick's. A row without a
    backward pass has a pale bar for its forward rate. The bars of training steps show time.
    """
    parts: list[str] = []
    top = float(_TOP)
    measured = [AttentionRow(**row) for row in results["attention"]]
    for seq_len, group in groupby(measured, key=lambda row: row.seq_len):
        drawn, top = _panel(list(group), f"T = {seq_len:,}, FLOP/s of forward + backward, visible pairs only", top)
        parts += drawn
    for model, steps in groupby([StepRow(**row) for row in results["steps"]], key=lambda row: row.model):
        drawn, top = _step_panel(list(steps), f"a training step of {model}, ms", top)
        parts += drawn
    height = top + 4
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="white"/>',
        svg_text(16, 24, "Attention backends beside plain causal attention", size=16),
        svg_text(16, 42, device_line(results), size=11, colour="#445"),
        svg_text(16, 56, machine_line(results["machine"]), size=9, colour="#667"),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _panel(rows: Sequence[AttentionRow], title: str, top: float) -> tuple[list[str], float]:
    """The bars of one length, and the top of the next panel."""
    parts = [svg_text(16, top + 16, title, weight="bold")]
    speeds = [row.tflops or row.forward_tflops or 0.0 for row in rows]
    most = max(speeds) or 1.0
    begin = top + 24
    for at, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        y = begin + at * _ROW
        whole = row.tflops is not None
        remark = row.note
        if speed:
            remark = f"{rate(speed)} · {_shown(row.forward, 1e3)} + {_shown(row.backward, 1e3)} ms"
            remark += (
                f" · {_shown(row.ratio, unit='× the yardstick’s time')}" if row.backend != "yardstick" and whole else ""
            )
            remark = remark if whole else f"forward only: {rate(speed)} · {_shown(row.forward, 1e3, 'ms')}"
        parts += bar(y, f"{row.backend}, {row.mask}", row.backend, speed / most, remark, pale=not whole)
    for row in rows:
        if row.backend == "yardstick" and row.tflops:
            x = _LABEL + _BAR * row.tflops / most
            end = begin + len(rows) * _ROW - 6
            parts.append(
                f'<line x1="{x:.1f}" y1="{begin}" x2="{x:.1f}" y2="{end}" stroke="#556" stroke-dasharray="3 3"/>'
            )
    return parts, begin + len(rows) * _ROW + 14


def _step_panel(rows: Sequence[StepRow], title: str, top: float) -> tuple[list[str], float]:
    parts = [svg_text(16, top + 16, title, weight="bold")]
    most = max((row.seconds or 0.0 for row in rows), default=0.0) or 1.0
    for at, row in enumerate(rows):
        remark = row.note
        if row.seconds is not None:
            remark = f"{_shown(row.seconds, 1e3, 'ms')} · {_shown(row.tokens_per_second)} tokens/s"
            remark += (
                f" · {_shown(row.ratio, unit='× causal')}" if row.ratio is not None and row.mask != "causal" else ""
            )
        y = top + 24 + at * _ROW
        parts += bar(y, f"{row.backend}, {row.mask}", row.backend, (row.seconds or 0.0) / most, remark)
    return parts, top + 24 + len(rows) * _ROW + 14


def bar(y: float, label: str, backend: str, share: float, remark: str, *, pale: bool = False) -> Iterator[str]:
    """A label, a bar that takes a share of the width, and a remark behind it."""
    length = _BAR * share
    yield svg_text(_LABEL - 10, y + 13, label, anchor="end", size=12)
    if length:
        yield (
            f'<rect x="{_LABEL}" y="{y}" width="{max(1.0, length):.1f}" height="16" '
            f'fill="{_COLOURS.get(backend, _OTHER_COLOUR)}" opacity="{0.45 if pale else 1}"/>'
        )
    yield svg_text(_LABEL + _BAR + 14, y + 13, remark, size=11, colour="#111" if length else "#889")
