"""What the runs of paper.py say, together: `paper.json`, `table.md`, `paper-turns.svg`, `paper-compute.svg`.

Over seeds figures are pooled: the sums of all seeds' losses over the sums of their targets, conversation by
conversation; intervals and paired differences come from drawing conversations (ismdata.eval.bootstrap). So an interval
tells of other test conversations; what other seeds do is the range of the seeds beside it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ismdata.choices import MASK_COLOURS
from ismdata.eval.bootstrap import Bootstrap, FloatArray, estimate, paired_difference, ratio
from ismdata.eval.likelihood import conversation_numbers, group_sums
from ismdata.eval.results import Results, read_results
from ismdata.eval.text_scores import bleu, bleu_counts
from ismdata.train.metrics import METRICS_NAME

CONVERSATIONS, COMPUTE = "conversations", "compute"
#: What the others are compared with.
REFERENCE = "ism"
HEADINGS = (
    "trained",
    "equal",
    "nats per token [95 %]",
    "per seed",
    "minus ism [95 %]",
    "BLEU [95 %]",
    "tokens",
    "targets",
    "steps",
    "processor seconds",
)
#: A turn that fewer test conversations have is left out of the picture.
FEWEST = 20


@dataclass(frozen=True)
class Method:
    """A way to train: the mask, the shards, and whether a conversation is one pass."""

    mask: str
    shards: str
    one_pass: bool
    colour: str


METHODS = {
    "causal": Method("causal", "ism", True, MASK_COLOURS["causal"]),
    "ism": Method("ism", "ism", True, MASK_COLOURS["ism"]),
    "prefix": Method("prefix", "prefix", False, MASK_COLOURS["prefix"]),
    "prefix-3": Method("prefix", "prefix-3", False, "#b99ccb"),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a way, what it has in common with the one-pass ways, and a seed."""

    method: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}{'' if METHODS[self.method].one_pass else f'-{self.budget}'}-{self.seed}"


@dataclass(frozen=True)
class Trained:
    """The runs of one way and budget, a seed each, all of the same answers in the same order.

    losses: float64[seeds, answers, 2], nats and targets. group: conversation of each answer. turn: likewise.
    """

    method: str
    budget: str
    seeds: tuple[int, ...]
    losses: FloatArray
    group: np.ndarray[Any, Any]
    turn: np.ndarray[Any, Any]
    bleu_groups: list[FloatArray]
    cost: dict[str, float]

    def table(self, chosen: np.ndarray[Any, Any] | None = None) -> FloatArray:
        """Nats and targets of each conversation, all seeds together, [conversations, 2]."""
        pooled = self.losses.sum(0)
        if chosen is None:
            return group_sums(self.group, pooled)
        return group_sums(np.unique(self.group[chosen], return_inverse=True)[1], pooled[chosen])

    def by_seed(self) -> FloatArray:
        """Nats a target of each seed, [seeds]."""
        sums = self.losses.sum(1)
        return np.asarray(sums[:, 0] / sums[:, 1])


def read_cost(folder: Path, run: Run) -> dict[str, float]:
    """Steps, tokens, targets and time of a run; the time over all its tries."""
    with (folder / f"model-{run.name}" / METRICS_NAME).open(newline="") as file:
        *_, last = (row for row in csv.DictReader(file) if row["tokens"])
    stage = json.loads((folder / "stages" / f"model-{run.name}.json").read_text())
    names = ("step", "tokens", "target_tokens")
    return {name: float(last[name]) for name in names} | {
        name: stage[name] for name in ("seconds", "processor_seconds")
    }


def read_trained(folder: Path, method: str, budget: str, seeds: Sequence[int]) -> Trained:
    runs = [Run(method=method, budget=budget, seed=seed) for seed in seeds]
    results = [read_results(folder / f"eval-{run.name}") for run in runs]
    lines = [sorted(each.outputs, key=lambda line: (line["conversation"], line["answer"])) for each in results]
    costs = [read_cost(folder, run) for run in runs]
    first = lines[0]
    return Trained(
        method,
        budget,
        tuple(seeds),
        np.array([[[line["nll"], line["target_tokens"]] for line in each] for each in lines]),
        conversation_numbers([line["conversation"] for line in first]),
        np.array([line["turn"] for line in first]),
        [_bleu_groups(result, each) for result, each in zip(results, lines, strict=True)],
        {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]},
    )


def _bleu_groups(result: Results, lines: Sequence[dict[str, Any]]) -> FloatArray:
    """The counts that BLEU is made of, a row for each conversation that was answered; none without --generate."""
    said = [line for line in lines if line["generated"] is not None]
    if not said:
        return np.zeros((0, 0))
    counts = bleu_counts(
        [line["generated"] for line in said],
        [line["reference"] for line in said],
        result.facts["generation"]["tokenizer"],
    )
    return group_sums(conversation_numbers([line["conversation"] for line in said]), counts)


def whole_seeds(folder: Path) -> list[int]:
    """The seeds of which every run is done."""
    every = [(name, budget) for name, method in METHODS.items() for budget in budgets(method)]
    first = [int(path.name.rsplit("-", 1)[1]) for path in folder.glob(f"eval-{REFERENCE}-*")]
    return sorted(
        seed
        for seed in first
        if all((folder / f"eval-{Run(method=name, budget=budget, seed=seed).name}").exists() for name, budget in every)
    )


def budgets(method: Method) -> tuple[str, ...]:
    """What a way is run at: one pass is one run for both."""
    return (CONVERSATIONS,) if method.one_pass else (CONVERSATIONS, COMPUTE)


def facts_of(folder: Path, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """All figures of one corpus and model; None where no seed is whole yet."""
    seeds = whole_seeds(folder)
    if not seeds:
        return None
    trained = [
        read_trained(folder, name, budget, seeds) for name, method in METHODS.items() for budget in budgets(method)
    ]
    reference = next(each for each in trained if each.method == REFERENCE)
    for each in trained:
        if not np.array_equal(each.group, reference.group) or not np.array_equal(
            each.losses[:, :, 1], reference.losses[:, :, 1]
        ):
            raise SystemExit(f"{folder}: {each.method} was evaluated on other answers than {REFERENCE}")
    return {
        "setting": json.loads((folder / "setting.json").read_text()),
        "seeds": seeds,
        "test": {
            "conversations": int(reference.group.max()) + 1,
            "answers": len(reference.group),
            "target_tokens": int(reference.losses[0, :, 1].sum()),
        },
        "rows": [_row(each, reference, bootstrap) for each in trained],
    }


def _row(trained: Trained, reference: Trained, bootstrap: Bootstrap) -> dict[str, Any]:
    numbers, counts = np.unique(trained.turn, return_counts=True)
    row = {
        "method": trained.method,
        "budget": trained.budget,
        "cost": trained.cost,
        "nll": estimate(trained.table(), ratio, bootstrap).as_json(),
        "nll_by_seed": trained.by_seed().tolist(),
        "less_ism": None,
        "less_ism_by_seed": None,
        "by_turn": [
            {
                "turn": int(number),
                "conversations": int(count),
                "nll": estimate(trained.table(trained.turn == number), ratio, bootstrap).as_json(),
            }
            for number, count in zip(numbers, counts, strict=True)
        ],
        "bleu": None,
        "bleu_by_seed": None,
    }
    if trained is not reference:
        row["less_ism"] = paired_difference(trained.table(), reference.table(), ratio, bootstrap).as_json()
        row["less_ism_by_seed"] = (trained.by_seed() - reference.by_seed()).tolist()
    if all(each.size for each in trained.bleu_groups):
        row["bleu"] = estimate(sum(trained.bleu_groups), bleu, bootstrap).as_json()
        row["bleu_by_seed"] = [float(bleu(each.sum(0, keepdims=True))[0]) for each in trained.bleu_groups]
    return row


def markdown(name: str, facts: dict[str, Any]) -> str:
    """One table: a line for each way and budget."""
    setting, test = facts["setting"], facts["test"]
    drawn = "all" if setting["train"] is None else f"{setting['train']:,}"
    lines = [
        f"### {name}",
        "",
        f"Training: {drawn} conversations, epochs: {setting['epochs']:g}. "
        f"Test: {test['conversations']:,} conversations, {test['answers']:,} answers, "
        f"{test['target_tokens']:,} tokens. Seeds: {', '.join(map(str, facts['seeds']))}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for row in facts["rows"]:
        both = METHODS[row["method"]].one_pass
        cost = row["cost"]
        less = "" if row["less_ism"] is None else _with_interval(row["less_ism"], "+.3f")
        cells = [
            row["method"],
            "both" if both else row["budget"],
            _with_interval(row["nll"], ".3f"),
            ", ".join(f"{value:.3f}" for value in row["nll_by_seed"]),
            less,
            "" if row["bleu"] is None else _with_interval(row["bleu"], ".2f"),
            *(f"{cost[key]:,.0f}" for key in ("tokens", "target_tokens", "step", "processor_seconds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _with_interval(estimated: dict[str, Any], form: str) -> str:
    interval = estimated["interval"]
    edges = "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
    return f"{estimated['value']:{form}}{edges}"


def write_report(output: Path) -> Path:
    """Read all folders below `output` and write the report there."""
    bootstrap = Bootstrap()
    found = {}
    for path in sorted(output.glob("*/setting.json")):
        facts = facts_of(path.parent, bootstrap)
        if facts is not None:
            found[path.parent.name] = facts
    (output / "paper.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = [markdown(name, facts) for name, facts in found.items()] or ["No seed is whole yet.\n"]
    (output / "table.md").write_text("\n".join(tables), encoding="utf-8")
    if found:
        draw(found, output)
    return output


def draw(found: dict[str, Any], output: Path) -> None:
    """By turn, and against the tokens that training took: a panel for each corpus and model."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the pictures need matplotlib: pip install 'ismdata[plots]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "ismdata", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    for name, panel in (("paper-turns", _draw_turns), ("paper-compute", _draw_compute)):
        figure, panels = pyplot.subplots(
            1, len(found), figsize=(max(7, 5.2 * len(found)), 4.4), layout="constrained", squeeze=False
        )
        for axes, (title, facts) in zip(panels[0], found.items(), strict=True):
            panel(axes, facts)
            axes.set(title=title, ylabel="nats per token")
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize=9, ncols=3, loc="outside lower center")
        figure.savefig(output / f"{name}.svg", metadata={"Date": None})
        figure.savefig(output / f"{name}.png", dpi=120)
        pyplot.close(figure)


def _label(row: dict[str, Any]) -> str:
    return row["method"] if METHODS[row["method"]].one_pass else f"{row['method']}, equal {row['budget']}"


def _draw_turns(axes: Any, facts: dict[str, Any]) -> None:
    for row in facts["rows"]:
        turns = [each for each in row["by_turn"] if each["conversations"] >= FEWEST]
        axes.plot(
            [each["turn"] for each in turns],
            [each["nll"]["value"] for each in turns],
            color=METHODS[row["method"]].colour,
            linestyle="-" if row["budget"] == CONVERSATIONS else ":",
            label=_label(row),
        )
    axes.set(xlabel=f"turn (those of at least {FEWEST} test conversations)")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_compute(axes: Any, facts: dict[str, Any]) -> None:
    for row in facts["rows"]:
        seeds = row["nll_by_seed"]
        axes.errorbar(
            row["cost"]["tokens"],
            np.mean(seeds),
            [[np.mean(seeds) - min(seeds)], [max(seeds) - np.mean(seeds)]],
            color=METHODS[row["method"]].colour,
            marker="o" if row["budget"] == CONVERSATIONS else "s",
            linestyle="none",
            capsize=3,
            label=_label(row),
        )
    axes.set(xlabel="million tokens that training took (bars: lowest and highest seed)", xscale="log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(lambda tokens, _: f"{tokens / 1e6:.2g}" if f"{tokens:e}"[0] in "125" else "")
