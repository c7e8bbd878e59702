"""The command line `ismdata`: one file per command in this package, wired here.

A command turns options into one call and the result into a view. It imports heavy packages inside its function, so
that `ismdata --help` is quick.
"""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.completion import get_completion_inspect_parameters, install_callback, show_callback

from ismdata.cli.bench import bench_app
from ismdata.cli.chat import chat_command
from ismdata.cli.common import Overwrite, note_once
from ismdata.cli.convert import convert_command
from ismdata.cli.eval import eval_command
from ismdata.cli.help import MARKUP, Help, add_command, call_error, help_if_alone, help_text
from ismdata.cli.inspect import inspect_command
from ismdata.cli.pack import pack_command
from ismdata.cli.template import template_command
from ismdata.cli.tokenizer import tokenizer_app
from ismdata.cli.train import train_command
from ismdata.cli.verify import verify_command
from ismdata.display import draw, make_tolerant, note
from ismdata.errors import Terminated

#: Sets up Typer's completion, which the shell asks for through the environment variable _ISMDATA_COMPLETE.
get_completion_inspect_parameters()

app = typer.Typer(
    add_help_option=False,
    add_completion=False,  # its two flags are below: Typer's show that they take a `<bool>`
    rich_markup_mode=MARKUP,
    pretty_exceptions_enable=False,
    help=help_text(
        "Prepare multi-turn conversations as packed Arrow shards, and train models with the Intermittent Semi-working "
        "Mask.\n\n"
        "The usual order: convert raw corpora, pack them with a tokenizer, verify, inspect, train, eval, chat. "
        "`ismdata demo` runs all of it on a bundled sample; `ismdata COMMAND --help` explains a command, with examples."
    ),
    epilog=help_text("Exit codes: 0 done, 1 the data or a file is at fault, 2 the call is at fault."),
)


def _print_version(asked: bool) -> None:
    if asked:
        from ismdata import __version__

        draw(f"ismdata {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", metavar="", is_eager=True, callback=_print_version
        ),
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            help="Complete commands and options in this shell.",
            metavar="",
            is_eager=True,
            callback=install_callback,
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option(
            "--show-completion",
            help="Print the completion script of this shell.",
            metavar="",
            is_eager=True,
            callback=show_callback,
        ),
    ] = False,
    show_help: Help = False,
) -> None:
    help_if_alone(context)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run the whole pipeline on the bundled sample. Needs no network and no GPU; takes about a minute."""
    from ismdata.cli.demo import run_demo

    run_demo(output, overwrite=overwrite)


add_command(
    app,
    "convert",
    convert_command,
    examples=[
        "ismdata convert train.jsonl more.json.gz -o converted",
        "ismdata convert talks.csv --explain",
        "ismdata convert talks.json --dedup exact --split 98/2 -o converted",
    ],
    groups={
        "Reading": ("format_", "mapping", "explain", "role", "assistant", "tree", "preference", "join"),
        "Cleaning and splitting": ("dedup", "against", "min_turns", "exclude", "sample", "seed", "split", "splits"),
    },
)
add_command(
    app,
    "pack",
    pack_command,
    examples=[
        "ismdata pack converted -o packed --tokenizer Qwen/Qwen2.5-0.5B-Instruct",
        "ismdata pack converted -o packed --tokenizer ./tokenizer --seq-len 4096",
    ],
    groups={
        "Sequences": ("seq_len", "mask", "over_long", "prefix_every", "layout", "glm_mask_token", "glm_start_token"),
        "Chat template": ("chat_template", "history", "template_arg", "template_date", "train_on"),
    },
)
add_command(
    app,
    "verify",
    verify_command,
    examples=["ismdata verify packed", "ismdata verify packed --conversations converted"],
)
add_command(
    app,
    "inspect",
    inspect_command,
    examples=["ismdata inspect converted --source train.jsonl:214", "ismdata inspect packed --row 0"],
)
add_command(
    app,
    "template",
    template_command,
    examples=["ismdata template Qwen/Qwen2.5-0.5B-Instruct", "ismdata template chat_template.jinja"],
)
add_command(
    app,
    "train",
    train_command,
    examples=[
        "ismdata train packed --model tiny -o model --steps 200",
        "ismdata train packed --model Qwen/Qwen2.5-0.5B-Instruct --lora -o model",
        "ismdata train packed --config train.toml -o model",
    ],
    groups={
        "Model": ("model", "mask", "backend", "lora", "lora_rank", "lora_alpha"),
        "Length and batches": ("steps", "epochs", "batch_size", "accumulation", "global_batch", "seed"),
        "Optimization": ("learning_rate", "schedule", "warmup", "weight_decay", "max_grad_norm", "loss_weighting"),
        "Speed and memory": ("precision", "gradient_checkpointing", "compile", "fsdp", "workers"),
        "Evaluation, log and checkpoints": ("eval", "eval_every", "log_every", "save_every", "keep", "report_to"),
    },
)
add_command(
    app,
    "eval",
    eval_command,
    examples=["ismdata eval model packed-test", "ismdata eval model packed-test --generate 100 -o eval"],
    groups={
        "Generated answers": ("generate", "max_new_tokens", "bleu_tokenizer"),
        "Computation": ("mask", "batch_size", "precision", "resamples", "seed"),
    },
)
add_command(
    app,
    "chat",
    chat_command,
    examples=[
        "ismdata chat model",
        "ismdata chat model --system 'Be brief.' --temperature 0.7 --top-p 0.9",
        "ismdata chat model.gguf --mask causal",
    ],
    groups={
        "Sampling": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
        "Context": ("mask", "context", "when_full"),
    },
)
add_command(app, "demo", demo, examples=["ismdata demo", "ismdata demo -o trial --overwrite"])
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(bench_app, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. SIGTERM ends a command as Ctrl-C does.

    Args:
        arguments: The words after `ismdata`; those of the process by default.

    Raises:
        SystemExit: Always, with the exit code.
    """
    gc.set_threshold(50_000)  # imports create many objects and no cycles: 10 % of the time to start
    signal.signal(signal.SIGTERM, _terminate)
    make_tolerant()
    if not sys.warnoptions:
        # Addressed to whoever develops a library. Other warnings are for the user, as a line like our own.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        code = app(args=arguments, prog_name="ismdata", standalone_mode=False)
    except typer.Abort:
        code = 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        note_once(f"error: {call_error(error, sys.argv[1:] if arguments is None else arguments)}")
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _show_warning(message: Warning | str, *where: object) -> None:
    note(f"warning: {message}")


if __name__ == "__main__":
    main()
