"""The command `ismdata eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ismdata.choices import BleuTokenizer, Mask, Precision
from ismdata.cli.common import AsJson, Overwrite, show
from ismdata.display import TerminalReporter


def eval_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that `ismdata train` wrote, or, with --mask, any model: folder, GGUF file or hub name."
        ),
    ],
    packed: Annotated[Path, typer.Argument(help="A folder that `ismdata pack` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write eval.json and outputs.jsonl into.")
    ] = None,
    mask: Annotated[
        Mask | None,
        typer.Option(
            help="Mask to run the model under. Default: the one it was trained under. ism and causal share shards."
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Also generate the answers of up to N conversations, and score them by BLEU, chrF and ROUGE-L.",
        ),
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in a generated answer.")] = 256,
    bleu_tokenizer: Annotated[
        BleuTokenizer,
        typer.Option(help="Tokenizer of sacrebleu. auto: zh for Chinese, char for Japanese and Thai, else 13a."),
    ] = "auto",
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OTHER_EVAL", help="Folder of another evaluation, of the same answers, to compare with."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    precision: Annotated[
        Precision,
        typer.Option(help="Data type of the weights. auto: bfloat16 on a GPU, float32 elsewhere."),
    ] = "auto",
    resamples: Annotated[int, typer.Option(help="Number of bootstrap resamples for the intervals.")] = 1000,
    seed: Annotated[
        int, typer.Option(help="Seed of the resamples, and of the conversations that --generate selects.")
    ] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model answers.

    Reports the negative log-likelihood and perplexity of the answers, overall and by turn, with confidence intervals.
    --generate adds scores of generated answers, --compare the difference from another evaluation.
    """
    from ismdata.data import FORMAT, read_index
    from ismdata.rendering import check_model_name

    # Before torch is imported, which takes seconds.
    check_model_name(model, presets=False)
    read_index(packed, FORMAT)

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
            reporter=reporter,
            options=options,
        )
    show(eval_report(facts, None if output is None else str(output)), as_json=as_json)
