"""The command line `ismdata`: one file per command in this package, wired here.

A command turns options into one call and the result into a view. It imports heavy packages inside its function, so
that `ismdata --help` is quick.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from ismdata.cli.bench import bench_app
from ismdata.cli.chat import chat_command
from ismdata.cli.common import Overwrite, explained
from ismdata.cli.convert import convert_command
from ismdata.cli.eval import eval_command
from ismdata.cli.inspect import inspect_command
from ismdata.cli.pack import pack_command
from ismdata.cli.template import template_command
from ismdata.cli.train import train_command
from ismdata.cli.verify import verify_command
from ismdata.errors import Terminated

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prepare multi-turn conversations as packed Arrow shards, and train models with the Intermittent "
    "Semi-working Mask.\n\n"
    "The usual order: convert raw corpora, pack them with a tokenizer, verify, inspect, train, eval, chat. "
    "`ismdata demo` runs all of it on a bundled sample.",
    epilog="Exit codes: 0 done, 1 the data or a file is at fault, 2 the call is at fault.",
)
app.add_typer(bench_app, name="bench")


app.command("convert")(explained(convert_command))
app.command("pack")(explained(pack_command))
app.command("verify")(explained(verify_command))
app.command("inspect")(explained(inspect_command))
app.command("template")(explained(template_command))
app.command("train")(explained(train_command))
app.command("eval")(explained(eval_command))
app.command("chat")(explained(chat_command))


@app.command()
@explained
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run the whole pipeline on the bundled sample. Needs no network and no GPU; takes about a minute."""
    from ismdata.cli.demo import run_demo

    run_demo(output, overwrite=overwrite)


def main() -> None:
    """Run the command line; SIGTERM ends a command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
