"""The report of `ismdata eval` on the terminal, drawn from the content of eval.json."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ismdata.display import View, heading, title

#: Number of turns to show; eval.json has all of them.
_TURNS = 20


def eval_report(facts: dict[str, Any], output: str | None) -> View:
    """Draw an evaluation. facts: the content of eval.json. output: the folder written, if any."""
    model, overall = facts["model"], facts["overall"]
    setup = f"mask {facts['mask']} · {model['device']}, {model['precision']} · {facts['seconds']:.0f} s"
    counts = (
        f"{overall['target_tokens']:,} tokens in {overall['answers']:,} answers of {overall['conversations']:,} "
        "conversations"
    )
    parts: list[RenderableType] = [title(output or model["name"], setup), heading("answers", counts)]
    parts.append(_likelihoods(facts))
    if generation := facts["generation"]:
        parts += _generation(generation)
    if comparison := facts["comparison"]:
        parts += _comparison(comparison)
    resamples, confidence = facts["bootstrap"]["resamples"], facts["bootstrap"]["confidence"]
    note = f"\nIn brackets: {confidence:.0%} intervals from {resamples:,} bootstrap resamples of the conversations."
    parts.append(Text(note, style="dim"))
    return View(facts=facts, drawing=Group(*parts))


def _likelihoods(facts: dict[str, Any]) -> RenderableType:
    table = _table("turn", "conversations", "tokens", "nats per\ntoken", "", "perplexity")
    rows = [("all", facts["overall"]), *((str(each["turn"]), each) for each in facts["by_turn"][:_TURNS])]
    for name, row in rows:
        counts = (f"{row[count]:,}" for count in ("conversations", "target_tokens"))
        table.add_row(name, *counts, *_estimate(row["nll"], 4), _estimate(row["perplexity"], 2)[0])
    if facts["by_turn"][_TURNS:]:
        table.add_row("…", f"{len(facts['by_turn']) - _TURNS} more")
    return Padding(table, (0, 0, 0, 2), expand=False)


def _generation(generation: dict[str, Any]) -> list[RenderableType]:
    counts = f"{generation['answers']:,} answers of {generation['conversations']:,} conversations, greedy decoding"
    table = _table("", "", "", "")
    table.add_row("BLEU", *_estimate(generation["bleu"], 2), generation["bleu"]["signature"])
    table.add_row("chrF", f"{generation['chrf']['value']:.2f}", "", generation["chrf"]["signature"])
    table.add_row("ROUGE-L", f"{generation['rouge_l']['value']:.2f}", "", "")
    return [heading("generated", counts), Padding(table, (0, 0, 0, 2), expand=False)]


def _comparison(comparison: dict[str, Any]) -> list[RenderableType]:
    other = comparison["other"]
    table = _table("", "difference", "", "p")
    rows = [("nats per token", comparison["nll"], 4), ("BLEU", comparison["bleu"], 2)]
    rows += [(f"nats, turn {each['turn']}", each["nll"], 4) for each in comparison["by_turn"][:_TURNS]]
    for name, row, digits in rows:
        if row is not None:
            p_value = "" if row["p_value"] is None else f"{row['p_value']:.4f}"
            table.add_row(name, *_estimate(row, digits, signed=True), p_value)
    compared = heading("compared", f"this minus {other['folder']}: {other['model']['name']}, mask {other['mask']}")
    left_out = comparison["bleu_left_out"]
    notes = [Text(f"  No difference in BLEU: {left_out}.", style="yellow")] if left_out else []
    return [compared, Padding(table, (0, 0, 0, 2), expand=False), *notes]


def _estimate(estimate: dict[str, Any], digits: int, *, signed: bool = False) -> tuple[str, str]:
    """A value, and its interval in brackets if it has one."""
    form = f"{'+' if signed else ''},.{digits}f"
    if estimate["interval"] is None:
        return f"{estimate['value']:{form}}", ""
    low, high = estimate["interval"]
    return f"{estimate['value']:{form}}", f"[{low:{form}}, {high:{form}}]"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns), header_style="dim")
    for name in columns:
        # A number stays in one piece on a narrow terminal; an interval breaks after its comma.
        table.add_column(name, justify="left" if name == "" else "right", overflow="fold", no_wrap=name != "")
    return table
