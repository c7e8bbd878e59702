"""`ismdata template`: what a chat template can carry, for people who debug masks."""

from __future__ import annotations

from typing import Annotated

import typer

from ismdata.choices import History
from ismdata.cli.common import AsJson, show


def template_command(
    source: Annotated[
        str,
        typer.Argument(metavar="TOKENIZER_OR_FILE", help="A tokenizer (folder, GGUF file, hub name) or a Jinja file."),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="With a Jinja file: the tokenizer. Default: a stand-in that knows the template's markers."),
    ] = None,
    history: Annotated[History, typer.Option(help="How the conversation at the end is cut, as for pack.")] = "append",
    template_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the template, as in enable_thinking=false.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a chat template can carry: which conversations can be packed, what ends an answer and whether that is
    trained, what becomes of reasoning and tool calls; and one conversation with its spans.
    """
    from ismdata.cli.views.template import drawing
    from ismdata.display import View
    from ismdata.rendering import encoding_of, parse_arguments, report_template

    encoding = encoding_of(source, tokenizer=tokenizer, history=history, arguments=parse_arguments(template_arg or []))
    facts = report_template(encoding).facts
    show(View(facts=facts, drawing=drawing(facts)), as_json=as_json)
