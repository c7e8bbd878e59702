"""`ismdata pack`: tokenize conversations and pack them into sequences."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import History, Layout, Mask, OverLong, TokenizerBackend, TrainOn
from ismdata.cli.common import AsJson, Output, Overwrite, Workers, show
from ismdata.display import TerminalReporter
from ismdata.errors import UsageError


def pack_command(
    converted: Annotated[
        list[Path], typer.Argument(help="Folders that `ismdata convert` wrote; splits inside them stay apart.")
    ],
    output: Output,
    tokenizer: Annotated[str, typer.Option(help="The tokenizer: a local folder, a GGUF file or a hub name.")],
    chat_template: Annotated[
        str | None, typer.Option(help="The chat template: a Jinja file, or chatml. Default: the tokenizer's own.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, a multiple of 128.")] = 8192,
    mask: Annotated[Mask, typer.Option(help="The attention mask that targets and block tables are made for.")] = "ism",
    over_long: Annotated[
        OverLong,
        typer.Option(
            help="What happens to conversations longer than a sequence: split between turns, drop, truncate, or stop."
        ),
    ] = "split",
    history: Annotated[
        History,
        typer.Option(
            help="For templates that rewrite earlier turns. append: keep earlier turns as they were first fed, as a KV "
            "cache does. expand: make one document per answer, each exactly as rendered."
        ),
    ] = "append",
    template_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the template, e.g. enable_thinking=false. Repeatable.")
    ] = None,
    template_date: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM-DD", help="The date that templates print as today. Default: 2024-07-26."),
    ] = None,
    prefix_every: Annotated[
        int, typer.Option(help="With --mask prefix: make a document for every N-th answer only.")
    ] = 1,
    train_on: Annotated[
        TrainOn,
        typer.Option(
            help="Which answers to train, of those that the messages' own flags allow: all, the last of each "
            "conversation, or all without their reasoning (content)."
        ),
    ] = "all",
    layout: Annotated[
        Layout,
        typer.Option(
            help="glm: put [MASK] and [START] before answers and give tokens two positions (for glm-tiny, glm-small)."
        ),
    ] = "plain",
    glm_mask_token: Annotated[
        str | None, typer.Option(help="The control token to use as [MASK]. Default: the tokenizer's own.")
    ] = None,
    glm_start_token: Annotated[
        str | None, typer.Option(help="The control token to use as [START]. Default: the tokenizer's own.")
    ] = None,
    tokenizer_backend: Annotated[
        TokenizerBackend,
        typer.Option(
            help="auto: use gigatoken (pip install 'ismdata[fast]') if its ids equal those of Hugging Face tokenizers "
            "(hf) on a sample of the corpus, otherwise hf."
        ),
    ] = "auto",
    workers: Workers = 0,
    seed: Annotated[int, typer.Option(help="Decides which documents share a sequence, and their order.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize conversations and pack them into sequences.

    Writes tokens, spans, targets, positions and block tables. Conversations read = packed + quarantined. No
    answer is trained twice.
    """
    from ismdata.rendering import check_tokenizer_name

    check_tokenizer_name(tokenizer)  # before pyarrow and transformers are imported

    from ismdata.cli.views import reports
    from ismdata.pack import pack
    from ismdata.rendering import DEFAULT_DATE, parse_arguments

    with TerminalReporter() as reporter:
        report = pack(
            converted,
            output,
            tokenizer=tokenizer,
            chat_template=chat_template,
            seq_len=seq_len,
            mask=mask,
            over_long=over_long,
            history=history,
            template_arguments=parse_arguments(template_arg or []),
            template_date=_date(template_date) if template_date else DEFAULT_DATE,
            prefix_every=prefix_every,
            train_on=train_on,
            layout=layout,
            glm_mask_token=glm_mask_token,
            glm_start_token=glm_start_token,
            tokenizer_backend=tokenizer_backend,
            workers=workers,
            seed=seed,
            overwrite=overwrite,
            reporter=reporter,
        )
    show(reports.pack_report(report), as_json=as_json)


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--template-date {text}: expected YYYY-MM-DD, as in 2024-07-26") from error
