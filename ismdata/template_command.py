"""`ismdata template`: what a chat template can carry, for people who debug masks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ismdata.command import AsJson, show


def template_command(
    source: Annotated[
        str,
        typer.Argument(metavar="TOKENIZER_OR_FILE", help="A tokenizer (folder, GGUF file, hub name) or a Jinja file."),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="With a Jinja file: the tokenizer. Default: a stand-in that knows the template's markers."),
    ] = None,
    history: Annotated[
        Literal["append", "expand"], typer.Option(help="How the conversation at the end is cut, as for pack.")
    ] = "append",
    template_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the template, as in enable_thinking=false.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a chat template can carry: which conversations can be packed, what ends an answer and whether that is
    trained, what becomes of reasoning and tool calls; and one conversation with its spans.
    """
    from ismdata.template import parse_arguments
    from ismdata.template_report import encoding_of, report
    from ismdata.view import View

    encoding = encoding_of(source, tokenizer=tokenizer, history=history, arguments=parse_arguments(template_arg or []))
    facts = report(encoding).facts
    show(View(facts=facts, drawing=_drawn(facts)), as_json=as_json)


#: What the report says where an answer's end is trained.
_TRAINED = {
    "always": "trained with every answer",
    "last": "trained where the answer is the last message; in history answers end with their text",
    "followed": "trained where another message follows; the last answer of a conversation has no end",
    "never": "nothing: answers have no end that could be trained",
}
_REASONING = {
    "kept": "kept, in history too",
    "cut": "written in the newest answer, cut from history",
    "left out": "left out: pack says how many answers that concerns",
    "refused": "such conversations are refused",
}


def _drawn(facts: dict[str, Any]) -> RenderableType:
    from ismdata.row_view import draw_spans, printable

    def quoted(text: str) -> str:
        return printable(repr(text)) if text else "nothing"

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    stable = "yes: what was fed stays a prefix of what is rendered"
    if not facts["prefix_stable"]:
        difference = facts["difference"] or {"fed": "", "rewritten": ""}
        stable = (
            f"no: after {quoted(difference['fed'][:60])} was fed, it renders {quoted(difference['rewritten'][:60])}"
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
        table.add_row("date", "printed: pack fixes it with --template-date")

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
        Rule(Text("a conversation with its spans", "bold"), align="left", style="dim", characters="─"),
        draw_spans(spans) if spans else Text("none: the template refuses each that was tried"),
    )
