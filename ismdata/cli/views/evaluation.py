"""What a person sees of an evaluation: `ismdata eval` on the terminal. Facts are those of eval.json."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ismdata.display import View

#: Turns that are shown; eval.json has all.
_TURNS = 20


def eval_report(facts: dict[str, Any], output: str | None) -> View:
    """What was measured, and where it was written."""
    model, overall = facts["model"], facts["overall"]
    title = Text.assemble(
        (str(output or model["name"]), "bold"),
        "  ",
        (f"mask {facts['mask']} · {model['device']}, {model['precision']} · {facts['seconds']:.0f} s", "dim"),
    )
    what = (
        f"{overall['target_tokens']:,} tokens in {overall['answers']:,} answers of {overall['conversations']:,} "
        "conversations"
    )
    parts: list[RenderableType] = [title, heading("answers", what), _likelihoods(facts)]
    if generation := facts["generation"]:
        parts += _generation(generation)
    if comparison := facts["comparison"]:
        parts += _comparison(comparison)
    drawn, width = facts["bootstrap"]["resamples"], facts["bootstrap"]["confidence"]
    parts.append(Text(f"\nIn brackets {width:.0%} intervals: conversations drawn {drawn:,} times.", style="dim"))
    return View(facts=facts, drawing=Group(*parts))


def _likelihoods(facts: dict[str, Any]) -> RenderableType:
    table = _table("turn", "conversations", "tokens", "nats a token", "", "perplexity")
    rows = [("all", facts["overall"]), *((str(each["turn"]), each) for each in facts["by_turn"][:_TURNS])]
    for name, row in rows:
        counts = (f"{row[count]:,}" for count in ("conversations", "target_tokens"))
        table.add_row(name, *counts, *_estimate(row["nll"], 4), _estimate(row["perplexity"], 2)[0])
    if facts["by_turn"][_TURNS:]:
        table.add_row("…", f"{len(facts['by_turn']) - _TURNS} more")
    return Padding(table, (0, 0, 0, 2), expand=False)


def _generation(generation: dict[str, Any]) -> list[RenderableType]:
    told = f"{generation['answers']:,} answers of {generation['conversations']:,} conversations, greedily"
    table = _table("", "", "", "")
    table.add_row("BLEU", *_estimate(generation["bleu"], 2), generation["bleu"]["signature"])
    table.add_row("chrF", f"{generation['chrf']['value']:.2f}", "", generation["chrf"]["signature"])
    table.add_row("ROUGE-L", f"{generation['rouge_l']['value']:.2f}", "", "")
    return [heading("generated", told), Padding(table, (0, 0, 0, 2), expand=False)]


def _comparison(comparison: dict[str, Any]) -> list[RenderableType]:
    other = comparison["other"]
    table = _table("", "difference", "", "p")
    rows = [("nats a token", comparison["nll"], 4), ("BLEU", comparison["bleu"], 2)]
    rows += [(f"nats, turn {each['turn']}", each["nll"], 4) for each in comparison["by_turn"][:_TURNS]]
    for name, row, digits in rows:
        if row is not None:
            p_value = "" if row["p_value"] is None else f"{row['p_value']:.4f}"
            table.add_row(name, *_estimate(row, digits, signed=True), p_value)
    compared = heading("compared", f"this less {other['folder']}: {other['model']['name']}, mask {other['mask']}")
    left_out = comparison["bleu_left_out"]
    notes = [Text(f"  No difference in BLEU: {left_out}.", style="yellow")] if left_out else []
    return [compared, Padding(table, (0, 0, 0, 2), expand=False), *notes]


def _estimate(estimate: dict[str, Any], digits: int, *, signed: bool = False) -> tuple[str, str]:
    """A value, and its interval in brackets where it has one."""
    form = f"{'+' if signed else ''},.{digits}f"
    interval = estimate["interval"]
    return f"{estimate['value']:{form}}", "" if interval is None else "[" + ", ".join(
        f"{x:{form}}" for x in interval
    ) + "]"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns), header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name == "" else "right", overflow="fold")
    return table


def heading(text: str, rest: str) -> Text:
    return Text.assemble("\n", (text, "bold"), "  ", (rest, "dim"))
