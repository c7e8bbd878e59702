"""Report `ismdata bench latency`: rows by turn, their summary, tables, and a picture like Figure 4 of the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from ismdata.bench.report import machine_line, number, svg_text
from ismdata.choices import MASK_COLOURS
from ismdata.display import View

#: Counted operations may differ from the formula by this share.
TOLERANCE = 0.02

_PANEL, _HEIGHT, _LEFT, _GAP, _TOP = 470, 300, 62, 96, 92
#: Leaves room for the legend above the lines.
_HEADROOM = 1.25


@dataclass(frozen=True, kw_only=True)
class TurnRow:
    """The time to the first token under one mask at one turn.

    Attributes:
        mask: `ism`, `causal` or `prefix`.
        turn: Counted from 1.
        new: Tokens that are fed.
        keys: Keys that they see.
        seconds: By the clock, per round.
        processor: Processor time of all threads, per round. It varies less than the clock when other processes use
            the machine.
    """

    mask: str
    turn: int
    new: int
    keys: int
    seconds: list[float]
    processor: list[float]

    @property
    def median(self) -> float:
        """The median of `seconds`."""
        return statistics.median(self.seconds)

    @property
    def middle(self) -> tuple[float, float]:
        """The lower and the upper quartile: half of the rounds lie between them."""
        if len(self.seconds) == 1:
            return self.median, self.median
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper

    def cell(self) -> str:
        """The median and, if there are several rounds, the minimum and maximum."""
        spread = f" ({_digits(min(self.seconds))}–{_digits(max(self.seconds))})" if len(self.seconds) > 1 else ""
        return _digits(self.median) + spread

    def line(self) -> str:
        """The row in a few words."""
        return f"{self.mask} {_digits(self.median)} s"

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self) | {"median": self.median, "processor_median": statistics.median(self.processor)}


def _digits(seconds: float) -> str:
    """Format seconds with three digits; 100 and more as whole seconds.

    >>> _digits(0.0289), _digits(1.0), _digits(1234.5)
    ('0.0289', '1.00', '1,234')
    """
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:#.3g}"


@dataclass(frozen=True, kw_only=True)
class FlopsRow:
    """Operations of a first token: counted, by the model's formula, and by the paper's (`flops.py`)."""

    mask: str
    turn: int
    new: int
    keys: int
    counted: int
    formula: int
    textbook: int

    @property
    def ratio(self) -> float:
        """Counted operations divided by the formula's."""
        return self.counted / self.formula

    @property
    def agrees(self) -> bool:
        """Whether count and formula differ by at most TOLERANCE."""
        return abs(self.ratio - 1) <= TOLERANCE

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        counted, formula, textbook = (f"{count / 1e9:,.2f}" for count in (self.counted, self.formula, self.textbook))
        verdict = f"{self.ratio:.4f}" + ("" if self.agrees else ", differs")
        return self.mask, str(self.turn), f"{self.new:,}", f"{self.keys:,}", counted, formula, verdict, textbook

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self) | {"ratio": self.ratio, "agrees": self.agrees}


def summary(rows: Sequence[TurnRow]) -> dict[str, Any]:
    """Summarize the growth from turn 2 to the last turn per mask, and the ratios of masks at the last turn.

    Each value is computed from medians of the clock and, with the suffix `_processor`, of processor time.
    """
    facts: dict[str, Any] = {"last_turn": max(row.turn for row in rows)}
    for suffix, samples in (("", "seconds"), ("_processor", "processor")):
        medians = {(row.mask, row.turn): statistics.median(getattr(row, samples)) for row in rows}
        last = {mask: medians[mask, facts["last_turn"]] for mask in MASK_COLOURS}
        facts[f"growth{suffix}"] = {mask: last[mask] / medians[mask, 2] for mask in MASK_COLOURS}
        facts[f"ism_over_causal{suffix}"] = last["ism"] / last["causal"]
        facts[f"prefix_over_ism{suffix}"] = last["prefix"] / last["ism"]
    return facts


def latency_table(results: dict[str, Any]) -> View:
    """Show the results of `ismdata bench latency`.

    Args:
        results: What `bench.json` holds.

    Returns:
        The results as a JSON object, and tables for the terminal.
    """
    rows = _rows(results)
    times = Table(title=f"{_setting(results)}\n{machine_line(results['machine'])}", title_justify="left")
    times.title_style = "dim"
    for name in ("turn", "tokens before", *(f"{mask}, s" for mask in MASK_COLOURS), "ism / causal", "prefix / ism"):
        times.add_column(name, justify="right")
    for turn in sorted({row.turn for row in rows}):
        by_mask = {row.mask: row for row in rows if row.turn == turn}
        ism, causal, prefix = (by_mask[mask] for mask in MASK_COLOURS)
        ratios = number(ism.median / causal.median), number(prefix.median / ism.median)
        cells = (by_mask[mask].cell() for mask in MASK_COLOURS)
        times.add_row(str(turn), f"{ism.keys - ism.new:,}", *cells, *ratios)
    flops = Table(title="operations of a first token, in billions; a multiplication and its addition are two")
    flops.title_justify, flops.title_style = "left", "dim"
    for name in ("mask", "turn", "new tokens", "keys", "counted", "formula", "counted / formula", "paper's, corrected"):
        flops.add_column(name, justify="left" if name == "mask" else "right")
    for row in results["flops"]:
        flops.add_row(*_flops_row(row).cells())
    return View(facts=results, drawing=Group(times, *_conclusions(results["summary"]), "", flops))


def _rows(results: dict[str, Any]) -> list[TurnRow]:
    derived = ("median", "processor_median")
    return [TurnRow(**{key: row[key] for key in row if key not in derived}) for row in results["turns"]]


def _flops_row(row: dict[str, Any]) -> FlopsRow:
    return FlopsRow(**{key: row[key] for key in row if key not in ("ratio", "agrees")})


def _conclusions(facts: dict[str, Any]) -> Iterator[str]:
    """Growth and ratios in words, by the clock and by processor time."""
    last = facts["last_turn"]
    for suffix, by in (("", "the clock"), ("_processor", "processor time")):
        growth = ", ".join(f"{mask} {number(times)} ×" for mask, times in facts[f"growth{suffix}"].items())
        ism, prefix = number(facts[f"ism_over_causal{suffix}"]), number(facts[f"prefix_over_ism{suffix}"])
        yield f"By {by}: from turn 2 to {last} {growth}; at turn {last} ism {ism} × causal, prefix {prefix} × ism"


def _setting(results: dict[str, Any]) -> str:
    """Model, device and conversation in one line."""
    model, device, options = results["model"], results["device"], results["options"]
    where = f"{device['name']}, threads: {device['threads']}" if device["name"] == "cpu" else device["name"]
    rounds = f"rounds: {options['rounds']}"
    if options["prefix_rounds"] != options["rounds"]:
        rounds += f", of prefix {options['prefix_rounds']}"
    return (
        f"{model['name']}, {model['parameters'] / 1e6:,.0f} M parameters, {model['dtype']}, {where}; "
        f"turns of {options['query']} + {options['answer']} tokens; {rounds}"
    )


def picture(results: dict[str, Any]) -> str:
    """Draw an SVG like Figure 4: time to first token by turn, all masks on the left, ism and causal on the right.

    Lines connect medians. Bands contain the middle half of the rounds, so that one outlier does not set the scale.
    """
    rows = _rows(results)
    width, height = 2 * _PANEL + _LEFT + _GAP + 30, _TOP + _HEIGHT + 50
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        svg_text(16, 24, "Time to first token by turn", size=16),
        svg_text(16, 42, _setting(results), size=11, colour="#445"),
        svg_text(16, 56, machine_line(results["machine"]), size=9, colour="#667"),
    ]
    keepers = [row for row in rows if row.mask != "prefix"]
    panels = [
        *_panel(rows, "all masks, seconds", _LEFT),
        *_panel(keepers, "ism and causal alone, seconds", _LEFT + _PANEL + _GAP),
    ]
    return "\n".join([*head, *panels, "</svg>"]) + "\n"


def _panel(rows: Sequence[TurnRow], title: str, left: float) -> Iterator[str]:
    """Draw axes, and a line and a band per mask."""
    turns = max(row.turn for row in rows)
    most = max(row.middle[1] for row in rows) * _HEADROOM
    step = _step(most)
    top_value = step * math.ceil(most / step)
    bottom = _TOP + _HEIGHT

    def x(turn: float) -> float:
        return left + _PANEL * (turn - 1) / (turns - 1)

    def y(seconds: float) -> float:
        return bottom - _HEIGHT * seconds / top_value

    yield svg_text(left, _TOP - 14, title, weight="bold")
    for mark in range(round(top_value / step) + 1):
        at = y(mark * step)
        yield f'<line x1="{left}" y1="{at:.1f}" x2="{left + _PANEL}" y2="{at:.1f}" stroke="#e3e6ea"/>'
        yield svg_text(left - 8, at + 4, f"{mark * step:g}", size=11, colour="#445", anchor="end")
    for turn in range(1, turns + 1):
        if turn == 1 or turn % math.ceil(turns / 10) == 0:
            yield svg_text(x(turn), bottom + 18, str(turn), size=11, colour="#445", anchor="middle")
    yield svg_text(left + _PANEL / 2, bottom + 38, "turn", size=12, colour="#445", anchor="middle")
    masks = [mask for mask in MASK_COLOURS if any(row.mask == mask for row in rows)]
    for at, mask in enumerate(masks):
        of_mask = [row for row in rows if row.mask == mask]
        lower, upper = ([f"{x(row.turn):.1f},{y(row.middle[end]):.1f}" for row in of_mask] for end in (0, 1))
        line = " ".join(f"{x(row.turn):.1f},{y(row.median):.1f}" for row in of_mask)
        colour = MASK_COLOURS[mask]
        yield f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" opacity="0.18"/>'
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{_dashes(mask)}/>'
        legend = _TOP + 14 + 20 * at
        yield (
            f'<line x1="{left + 14}" y1="{legend}" x2="{left + 44}" y2="{legend}" stroke="{colour}" '
            f'stroke-width="2"{_dashes(mask)}/>'
        )
        yield svg_text(left + 52, legend + 4, f"{mask}, at turn {turns} {_digits(of_mask[-1].median)} s", size=12)


def _dashes(mask: str) -> str:
    """causal is dashed, since it coincides with ism."""
    return ' stroke-dasharray="6 4"' if mask == "causal" else ""


def _step(most: float) -> float:
    """A round distance between marks, such that 4 to 10 of them reach `most`.

    >>> [_step(most) for most in (12.9, 0.25, 1.0)]
    [2.0, 0.05, 0.2]
    """
    size = 10.0 ** math.floor(math.log10(most or 1.0))
    return next(size * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if most / (size * part) <= 8)
