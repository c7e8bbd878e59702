"""`ismdata train` on the command line.

Precedence: flag, file of --config, default of TrainOptions; hence every flag's own default is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import AttentionBackend, LossWeighting, Mask, Precision, Schedule
from ismdata.cli.common import show
from ismdata.display import TerminalReporter


def train_command(
    packed: Annotated[Path, typer.Argument(help="A folder that `ismdata pack` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write. It appears when it is complete.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A preset to train from scratch (tiny, small, base, glm-tiny, glm-small), a model folder, a GGUF file "
            "or a Hugging Face hub name."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these options (batch_size = 8, …). Flags take precedence.")
    ] = None,
    eval: Annotated[
        str | None, typer.Option(metavar="PACKED", help="A packed folder to evaluate the loss on at the end.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every N steps too.")] = None,
    mask: Annotated[
        Mask | None,
        typer.Option(
            help="Default: the mask of the shards. Shards for ism can be trained under causal, and vice versa."
        ),
    ] = None,
    backend: Annotated[
        AttentionBackend | None,
        typer.Option(
            help="Attention backend. Default: auto, which is varlen on a GPU that supports it, else flex, else sdpa "
            "(docs/attention.md)."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: --epochs over the data.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, if --steps is not given. Default: 1.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per micro-batch on one process. Default: 4.")
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(help="Micro-batches per step on one process. Default: 1, or what --global-batch requires."),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences per step over all processes. With it a run can resume on another number of processes."
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 3e-4.")] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(help="How the learning rate decays after the warm-up. Default: cosine."),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up. Default: 20.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW. Default: 0.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the gradient norm to this; 0 does not clip. Default: 1.")
    ] = None,
    loss_weighting: Annotated[
        LossWeighting | None,
        typer.Option(help="What counts the same in a step's loss: each target token, answer or conversation."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides the initial weights and the order of the sequences. Default: 0.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the computation; weights are float32. Default: bfloat16 on a GPU, float32 elsewhere."
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing", help="Recompute activations in the backward pass instead of storing them."
        ),
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Compile the model with torch.compile.")] = None,
    lora: Annotated[
        bool | None,
        typer.Option("--lora", help="Train only low-rank adapters (peft). They are merged into the model at the end."),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters. Default: 16.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapters. Default: twice the rank.")] = None,
    fsdp: Annotated[
        bool | None,
        typer.Option("--fsdp", help="Shard the model over the GPUs (FSDP2) instead of replicating it (DDP)."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Data loading processes per training process. Default: 0.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of metrics.csv. Default: 10.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 500.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep. Default: 2.")] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Experiment tracker (tensorboard, wandb, trackio, …); repeatable. Default: none."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
) -> None:
    """Train a model on packed sequences. The model records the mask, for `ismdata chat` and
    `ismdata.attention.load`.

    After a crash, Ctrl-C or SIGTERM, the same command resumes from the last checkpoint, with the same result.
    With several processes: torchrun --nproc-per-node 2 -m ismdata train …
    """
    flags = dict(locals())
    for name in ("packed", "output", "config", "overwrite"):
        del flags[name]
    flags["report_to"] = tuple(report_to or ())

    from ismdata.data import FORMAT, read_index
    from ismdata.rendering import check_model_name
    from ismdata.train import read_options

    # Before torch is imported, which takes seconds.
    options = read_options(config, flags)
    check_model_name(options.model)
    read_index(packed, FORMAT)
    if options.eval is not None:
        read_index(Path(options.eval), FORMAT)

    from ismdata.cli.views import reports
    from ismdata.train import train

    with TerminalReporter() as reporter:
        report = train(packed, output=output, options=options, overwrite=overwrite, reporter=reporter)
    show(reports.train_report(report), as_json=False)
