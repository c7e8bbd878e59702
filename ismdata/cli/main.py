"""The command line: options in, one call, errors out.

Heavy imports stand inside the commands, so that `ismdata --help` is quick.
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
    help="Multi-turn conversations to packed Arrow shards, and models trained with the Intermittent "
    "Semi-working Mask.\n\n"
    "The road: convert raw corpora, pack them with a tokenizer, verify, inspect, train, eval, chat. "
    "`ismdata demo` walks all of it on a bundled sample.",
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
    """Walk the whole road on the bundled sample: no network, no GPU, a few minutes."""
    from ismdata.cli.demo import run_demo

    run_demo(output, overwrite=overwrite)


def main() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
