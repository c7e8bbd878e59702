"""`ismdata eval` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import BleuTokenizer, Mask, Precision
from ismdata.cli.common import show
from ismdata.display import TerminalReporter, note


def eval_command(
    model: Annotated[
        str, typer.Argument(help="A folder that `ismdata train` wrote; with --mask also a GGUF file or hub name.")
    ],
    packed: Annotated[Path, typer.Argument(help="A folder that `ismdata pack` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write: eval.json and outputs.jsonl.")
    ] = None,
    mask: Annotated[
        Mask | None,
        typer.Option(help="Default: the one that the model was trained under. ism and causal shards serve each other."),
    ] = None,
    generate: Annotated[
        int, typer.Option(metavar="N", help="Answer at most N conversations greedily, too: BLEU, chrF, ROUGE-L.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 256,
    bleu_tokenizer: Annotated[
        BleuTokenizer,
        typer.Option(help="How sacrebleu cuts words. auto: zh for Chinese, char for Japanese and Thai, else 13a."),
    ] = "auto",
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER_EVAL", help="A folder of another evaluation, of the same answers, to compare with."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    precision: Annotated[
        Precision,
        typer.Option(help="Of the model. auto: bfloat16 on a GPU, float32 elsewhere."),
    ] = "auto",
    resamples: Annotated[int, typer.Option(help="How often conversations are drawn for an interval.")] = 1000,
    seed: Annotated[int, typer.Option(help="Decides what is drawn, and which conversations --generate takes.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")] = False,
) -> None:
    """Measure how well a model answers: negative log-likelihood and perplexity of the answers, overall and by turn,
    with intervals; generated answers; the difference to another evaluation.
    """
    from ismdata.cli.views.evaluation import eval_report
    from ismdata.eval import EvalOptions, run_eval

    options = EvalOptions(
        mask=mask,
        generate=generate,
        max_new_tokens=max_new_tokens,
        bleu_tokenizer=bleu_tokenizer,
        batch_size=batch_size,
        precision=precision,
        resamples=resamples,
        seed=seed,
    )
    with TerminalReporter() as reporter:
        facts = run_eval(
            model,
            packed,
            output=output,
            compare_with=compare,
            overwrite=overwrite,
            say=note,
            progress=reporter.progress,
            options=options,
        )
    show(eval_report(facts, None if output is None else str(output)), as_json=as_json)
