"""Report a benchmark: its rows, the machine they were measured on, a table and a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from ismdata.display import View

_PACKAGES = ("ismdata", "numpy", "pyarrow", "tokenizers", "gigatoken", "transformers", "torch", "datasets", "trl")

_WIDTH, _ROW, _LABEL, _BAR, _TOP = 1140, 46, 530, 320, 62
_COLOURS = {"ours": "#2563a8", "yardstick": "#b9bec6"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: The measurement, as in `--only`.
        what: What was measured.
        corpus: On which corpus.
        unit: Of `ours` and `yardstick`.
        ours: The value of ismdata; None if there is none.
        yardstick: The value that it is compared with; None if there is none.
        ratio: What `ratio_is` says.
        ratio_is: What the ratio means, e.g. `times faster`.
        note: Why there is no value, or a remark.
        failed: Whether the measurement failed.
        details: Every single time.
    """

    name: str
    what: str
    corpus: str
    unit: str
    ours: float | None = None
    yardstick: float | None = None
    ratio: float | None = None
    ratio_is: str = ""
    note: str = ""
    failed: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """The cells of the table: what, corpus, ours, yardstick, ratio, note."""
        ratio = "" if self.ratio is None else f"{number(self.ratio)} {self.ratio_is}"
        ours, yardstick = (_with_unit(value, self.unit) for value in (self.ours, self.yardstick))
        return self.what, self.corpus, ours, yardstick, ratio, self.note

    def line(self) -> str:
        """The row as one line of text."""
        return " · ".join(cell for cell in self.cells() if cell)

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)


def number(value: float) -> str:
    """Format a number with three or four digits. Integers are exact; numbers near 1 keep four decimals.

    >>> [number(value) for value in (938, 12345.6, 63.21, 1.00042, 0.0123)]
    ['938', '12,346', '63.2', '1.0004', '0.0123']
    """
    if value >= 1000 or isinstance(value, int):
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    if 0.99 < value < 1.01:
        return f"{value:.4f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _with_unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value)} {unit}"


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores, memory, system, and versions of the packages involved."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_at_the_end": list(os.getloadavg()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES if find_spec(package) is not None},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "not installed"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def machine_line(about: dict[str, Any]) -> str:
    """The description of a machine in one line."""
    versions = ", ".join(f"{name} {of}" for name, of in about["versions"].items())
    memory = about["memory_bytes"] / 2**30
    return f"{about['processor']}, {about['cores']} cores, {memory:.0f} GiB; Python {about['python']}, {versions}"


def table(results: dict[str, Any]) -> View:
    """Show the results of `ismdata bench data`.

    Args:
        results: What `bench.json` holds.

    Returns:
        The results as a JSON object, and a table for the terminal.
    """
    drawing = Table(title=machine_line(results["machine"]), title_justify="left", title_style="dim")
    drawing.add_column("what")
    drawing.add_column("corpus")
    for name in ("ours", "yardstick", "ratio"):
        drawing.add_column(name, justify="right")
    drawing.add_column("note")
    for row in results["rows"]:
        drawing.add_row(*Row(**row).cells())
    return View(facts=results, drawing=drawing)


def picture(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Draw an SVG with a pair of bars per row that is compared, scaled to the longer one."""
    compared = [row for row in rows if row.ours is not None and row.yardstick is not None]
    height = _TOP + _ROW * len(compared) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        svg_text(16, 24, "ismdata (blue) and its yardsticks (grey)", size=16),
        svg_text(16, 44, machine_line(about), size=9, colour="#667"),
    ]
    for at, row in enumerate(compared):
        top = _TOP + at * _ROW
        what, corpus, _, _, ratio, _ = row.cells()
        parts += [svg_text(16, top + 15, what), svg_text(16, top + 30, corpus, size=11, colour="#667")]
        most = max(row.ours or 0, row.yardstick or 0) or 1
        for kind, value, below in (("ours", row.ours or 0, 0), ("yardstick", row.yardstick or 0, 16)):
            length = max(1.0, _BAR * value / most)
            parts.append(
                f'<rect x="{_LABEL}" y="{top + 3 + below}" width="{length:.1f}" height="13" fill="{_COLOURS[kind]}"/>'
            )
            parts.append(svg_text(_LABEL + length + 6, top + 14 + below, _with_unit(value, row.unit), size=11))
        parts.append(svg_text(_WIDTH - 12, top + 22, ratio, anchor="end", weight="bold"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def svg_text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    colour: str = "#111",
    anchor: str = "start",
    weight: str = "normal",
) -> str:
    """A line of text in an SVG, with escaped characters."""
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
