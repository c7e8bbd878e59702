"""`ismdata tokenizer train`: a tokenizer for models that are trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.common import AsJson, Output, Overwrite, show
from ismdata.cli.help import MARKUP, Help, add_command, help_if_alone, help_text

tokenizer_app = typer.Typer(
    add_help_option=False, rich_markup_mode=MARKUP, help=help_text("Make a tokenizer for a model from scratch.")
)


@tokenizer_app.callback(invoke_without_command=True)
def tokenizer(context: typer.Context, show_help: Help = False) -> None:
    help_if_alone(context)


def train_command(
    converted: Annotated[list[Path], typer.Argument(help="Folders that `ismdata convert` wrote.")],
    output: Output,
    vocab_size: Annotated[
        int, typer.Option(help="Tokens of the vocabulary. A small corpus has words for fewer; then it has fewer.")
    ] = 8192,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE tokenizer on conversations, with the chat template ChatML.

    For the presets of `ismdata train`, which begin from scratch. A pretrained model needs its own tokenizer.
    """
    from ismdata.cli.views import reports
    from ismdata.data import ConvertedFolder, open_output
    from ismdata.rendering import train_tokenizer

    folders = [ConvertedFolder(folder) for folder in converted]
    with open_output(output, overwrite=overwrite, marker="tokenizer.json", inputs=converted) as partial:
        trained = train_tokenizer((text for folder in folders for text in folder.texts()), vocab_size=vocab_size)
        trained.save_pretrained(str(partial))
    show(reports.tokenizer_report(output, trained, wanted=vocab_size, converted=converted), as_json=as_json)


add_command(
    tokenizer_app,
    "train",
    train_command,
    examples=["ismdata tokenizer train converted -o tokenizer --vocab-size 4096"],
)
