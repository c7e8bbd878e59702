"""Draw what `ismdata template` reports."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ismdata.cli.views.row import draw_spans
from ismdata.display import printable

#: When the end of an answer is trained.
_TRAINED = {
    "always": "trained with every answer",
    "last": "trained if the answer is the last message; answers in history end with their text",
    "followed": "trained if another message follows; the last answer of a conversation has no end",
    "never": "never trained: answers have no end",
}
_REASONING = {
    "kept": "kept, in history too",
    "cut": "rendered in the newest answer, removed from history",
    "left out": "left out; pack reports how many answers lose it",
    "refused": "conversations with it are refused",
}


def drawing(facts: dict[str, Any]) -> RenderableType:
    """The facts of a template report for the terminal."""

    def quoted(text: str) -> str:
        return printable(repr(text)) if text else "nothing"

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    stable = "yes: the tokens fed so far stay a prefix of the next rendering"
    if not facts["prefix_stable"]:
        difference = facts["difference"] or {"fed": "", "rewritten": ""}
        stable = (
            f"no: {quoted(difference['fed'][:60])} becomes {quoted(difference['rewritten'][:60])} in the next rendering"
        )
    table.add_row("prefix-stable", stable)
    table.add_row("generation prompt", quoted(facts["generation_prompt"]))
    ends = facts["end_of_turn"] or " or ".join(map(quoted, facts["next_turn_ends"]))
    end = quoted(ends) if facts["end_of_turn"] else ends or "nothing"
    if ends and not facts["end_of_turn_is_token"]:
        end += " (plain text to this tokenizer)"
    if facts["end_of_turn"] and facts["end_of_turn_in_history"] not in ("", facts["end_of_turn"]):
        end += f", in history {quoted(facts['end_of_turn_in_history'])}"
    table.add_row("end of an answer", f"{end}; {_TRAINED[facts['end_of_turn_trained']]}")
    table.add_row("reasoning, in a field", _REASONING[facts["reasoning_field"]])
    table.add_row("reasoning, in the text", _REASONING[facts["reasoning_in_text"]])
    table.add_row("arguments of calls", f"read as {facts['arguments']}")
    if facts["prints_date"]:
        table.add_row("date", "printed; pack fixes it with --template-date")

    shapes = Table.grid(padding=(0, 2))
    shapes.add_column(no_wrap=True)
    for _ in range(2):
        shapes.add_column(no_wrap=True)
    shapes.add_column(overflow="fold", style="dim")
    shapes.add_row(Text("conversations with", "bold"), Text("append", "bold"), Text("expand", "bold"), "")
    for shape, found in facts["shapes"].items():
        cells = [
            Text("✓ packed", "green") if found[way] is None else Text(f"✗ {found[way]['reason']}", "red")
            for way in found
        ]
        detail = next((refused["detail"] for refused in found.values() if refused is not None), "")
        shapes.add_row(shape, *cells, printable(detail))
    spans = [
        {"kind": span["kind"], "runs": [{"target": span["train"], "text": span["text"]}]} for span in facts["example"]
    ]
    return Group(
        Text.assemble((facts["template"], "bold"), "  ", (f"with {facts['tokenizer']}", "dim")),
        "",
        table,
        "",
        shapes,
        "",
        Rule(Text("example conversation with its spans", "bold"), align="left", style="dim", characters="─"),
        draw_spans(spans) if spans else Text("none: the template refuses all conversations that were tried"),
    )
