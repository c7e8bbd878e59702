"""Perplexity by turn and by source, as CSV and as pictures beside it.

Pictures need matplotlib; the CSV files do not. A source is the corpus that the ids of conversations name
(`data.source_of`); where no id names one, there is neither file nor picture.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ismdata.choices import MASK_COLOURS
from ismdata.data import source_of
from ismdata.display import printable
from ismdata.eval.answers import Answers
from ismdata.eval.bootstrap import Bootstrap, FloatArray
from ismdata.eval.likelihood import Likelihood, likelihood_by

#: What groups the answers -> what its files are called.
GROUPS = {"turn": "perplexity-by-turn", "source": "perplexity-by-source"}

COLUMNS = ("conversations", "answers", "target_tokens", "nll", "perplexity", "low", "high")

#: The answers of conversations whose id names no corpus, or one that no other conversation has.
OTHER = "other"

#: Sources that a picture shows, those with the most targets.
_SHOWN_SOURCES = 15


@dataclass(frozen=True, kw_only=True)
class Row:
    """The likelihood of one group of answers."""

    name: str
    facts: Mapping[str, Any]

    def cells(self) -> dict[str, Any]:
        """The columns of the CSV after the name. `low` and `high` are the interval of the perplexity."""
        perplexity = self.facts["perplexity"]
        low, high = perplexity["interval"] or ("", "")
        counts = {name: self.facts[name] for name in ("conversations", "answers", "target_tokens")}
        return {
            **counts,
            "nll": self.facts["nll"]["value"],
            "perplexity": perplexity["value"],
            "low": low,
            "high": high,
        }


def by_source(answers: Answers, losses: FloatArray, bootstrap: Bootstrap) -> dict[str, Likelihood]:
    """Compute the loss per token over the answers of each source.

    Args:
        answers: The answers.
        losses: The loss of each answer, float64[A].
        bootstrap: How to resample the conversations for the intervals.

    Returns:
        One likelihood per source, those with the most targets first; {} if no source is known.
    """
    named = Counter(source_of(each) for each in set(answers.conversation))
    known = {name for name, count in named.items() if name is not None and count > 1}
    if not known:
        return {}
    sources = np.array([name if (name := source_of(each)) in known else OTHER for each in answers.conversation], object)
    targets = {name: int(answers.targets[sources == name].sum()) for name in sorted(set(sources.tolist()))}
    names = sorted(targets, key=lambda name: -targets[name])
    return likelihood_by(answers, losses, {name: sources == name for name in names}, bootstrap)


def write_groups(folder: Path, group: str, rows: Sequence[Row], *, mask: str) -> bool:
    """Write the CSV of a group and draw its picture.

    Args:
        folder: Where to write.
        group: `turn` or `source`.
        rows: The rows; without any, nothing is written.
        mask: The mask that the model ran under.

    Returns:
        False if matplotlib is not installed (pip install 'ismdata[plots]'); only the CSV is written then.
    """
    if not rows:
        return True
    with (folder / f"{GROUPS[group]}.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, (group, *COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({group: row.name, **row.cells()} for row in rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = rows if group == "turn" else rows[:_SHOWN_SOURCES]
    height = 4.0 if group == "turn" else 1.6 + 0.35 * len(shown)
    figure = Figure(figsize=(7, height), layout="constrained")
    panel = figure.subplots()
    (_draw_turns if group == "turn" else _draw_sources)(panel, shown, mask)
    panel.set_title(f"Perplexity by {group}, mask {mask}", loc="left", fontsize=11)
    figure.savefig(folder / f"{GROUPS[group]}.png", dpi=120)
    return True


def _draw_turns(panel: Any, rows: Sequence[Row], mask: str) -> None:
    turns = [int(row.name) for row in rows]
    cells = [row.cells() for row in rows]
    colour = MASK_COLOURS[mask]
    panel.plot(turns, [each["perplexity"] for each in cells], color=colour, marker="o", markersize=4, linewidth=1.5)
    if any(each["low"] != "" for each in cells):  # a turn of one conversation has none
        low, high = ([np.nan if each[name] == "" else each[name] for each in cells] for name in ("low", "high"))
        panel.fill_between(turns, low, high, color=colour, alpha=0.18, linewidth=0, label="95 % interval")
        panel.legend(frameon=False)
    panel.set_xlabel("turn")
    panel.set_ylabel("perplexity")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


def _draw_sources(panel: Any, rows: Sequence[Row], mask: str) -> None:
    places = range(len(rows), 0, -1)
    values = [row.cells()["perplexity"] for row in rows]
    panel.barh(places, values, color=MASK_COLOURS[mask], height=0.6)
    for place, row, value in zip(places, rows, values, strict=True):
        cells = row.cells()
        if cells["low"] != "":
            panel.plot([cells["low"], cells["high"]], [place, place], color="#333333", linewidth=1)
        panel.annotate(f" {value:,.1f}", (cells["high"] or value, place), va="center", fontsize=9)
    # `$` would begin a formula.
    labels = [f"{_short(row.name)}\n{row.facts['target_tokens']:,} tokens".replace("$", r"\$") for row in rows]
    panel.set_yticks(list(places), labels, fontsize=8)
    panel.set_xlabel("perplexity")
    panel.margins(x=0.12)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3, axis="x")


def _short(name: str) -> str:
    name = printable(name).replace("\n", " ")
    return name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
