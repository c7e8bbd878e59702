"""`ismdata train` on the command line. A flag that is not given leaves the word to the file of --config, then to the
default, so every flag's own default is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import AttentionBackend, LossWeighting, Mask, Precision, Schedule
from ismdata.cli.common import show
from ismdata.display import note


def train_command(
    packed: Annotated[Path, typer.Argument(help="A folder that `ismdata pack` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write. It appears when it is complete.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, small, base, glm-tiny or glm-small from scratch; or a local folder, GGUF file, hub name."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these options (batch_size = 8, …). A flag wins over it.")
    ] = None,
    eval: Annotated[
        str | None, typer.Option(metavar="PACKED", help="A packed folder whose loss is measured at the end.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Measure it every so many steps, too.")] = None,
    mask: Annotated[
        Mask | None,
        typer.Option(help="Default: the mask of the shards. ism and causal shards serve each other."),
    ] = None,
    backend: Annotated[
        AttentionBackend | None,
        typer.Option(
            help="Of attention. auto, the default: varlen on a GPU where it runs, else flex, else sdpa "
            "(docs/attention.md)."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: --epochs over the data.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, where --steps is not given. Default: 1.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences of a micro-batch on one process. Default: 4.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches of a step on one process. Default: 1, or as --global-batch asks.")
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences of a step over all processes. With it a run may go on with more or fewer of them."
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak. Default: 3e-4.")] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(help="How the learning rate falls after the warm-up. Default: cosine."),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up. Default: 20.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. Default: 0.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Gradients are scaled down to this norm; 0 leaves them. Default: 1.")
    ] = None,
    loss_weighting: Annotated[
        LossWeighting | None,
        typer.Option(help="What counts the same in a step's loss: each target, each answer, or each conversation."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides initial weights and the order of sequences. Default: 0.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the arithmetic; weights are float32. Default: bfloat16 on a GPU, float32 elsewhere."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them."),
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Compile the model with torch.compile.")] = None,
    lora: Annotated[
        bool | None,
        typer.Option("--lora", help="Train low-rank adapters (peft) alone; they are merged into the model at the end."),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Default: 16.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapters. Default: twice the rank.")] = None,
    fsdp: Annotated[
        bool | None, typer.Option("--fsdp", help="Shard the model over the GPUs (FSDP2) instead of copying it (DDP).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read data, for each that trains. Default: 0.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of metrics.csv. Default: 10.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 500.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep. Default: 2.")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, trackio, … Several times. Default: none.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
) -> None:
    """Train a model on packed sequences. The mask is recorded with it, for `ismdata chat` and
    `ismdata.attention.load`.

    Ended by a crash, Ctrl-C or SIGTERM, the same command goes on from the last checkpoint, to the same result.
    On several processes: torchrun --nproc-per-node 2 -m ismdata train …
    """
    flags = dict(locals())
    for name in ("packed", "output", "config", "overwrite"):
        del flags[name]
    flags["report_to"] = tuple(report_to or ())

    from ismdata.train import read_options

    options = read_options(config, flags)

    from ismdata.cli.views import reports
    from ismdata.train import train

    show(
        reports.train_report(train(packed, output=output, overwrite=overwrite, say=note, options=options)),
        as_json=False,
    )
