"""`ismdata template`: report what a chat template supports, to debug loss masks."""

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
        typer.Option(
            help="The tokenizer for a Jinja file. Default: a substitute that has the "
            "template's markers as special tokens."
        ),
    ] = None,
    history: Annotated[History, typer.Option(help="How the example conversation is divided, as for pack.")] = "append",
    template_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the template, e.g. enable_thinking=false. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what a chat template supports.

    Shows which kinds of conversation can be packed, what ends an answer and whether it is trained, what happens to
    reasoning and tool calls, and one conversation with its spans.
    """
    from ismdata.rendering import check_tokenizer_name

    check_tokenizer_name(tokenizer or source)

    from ismdata.cli.views.template import drawing
    from ismdata.display import View
    from ismdata.rendering import encoding_of, parse_arguments, report_template

    encoding = encoding_of(source, tokenizer=tokenizer, history=history, arguments=parse_arguments(template_arg or []))
    facts = report_template(encoding).facts
    show(View(facts=facts, drawing=drawing(facts)), as_json=as_json)
