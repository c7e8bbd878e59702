"""The command `ismdata chat`. It imports torch only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ismdata.choices import Mask


def chat_command(
    model: Annotated[
        Path,
        typer.Argument(help="A folder that `ismdata train` wrote; with --mask, the folder of any causal model."),
    ],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token; above 0 tokens are sampled.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the K most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens of at least this share of the highest probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that occur in the conversation become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    mask: Annotated[
        Mask | None, typer.Option(help="Mask to run the model under. Default: the one it was trained under.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Maximum number of tokens in the context. Default: all of the model's positions."),
    ] = None,
    when_full: Annotated[
        Literal["stop", "drop-oldest", "sirllm"],
        typer.Option(
            help="When the context is full: stop; drop the oldest turns; or evict the least surprising tokens, as "
            "SirLLM does."
        ),
    ] = "stop",
) -> None:
    """Talk with a model in the terminal. The KV cache is kept from turn to turn.

    Commands are /undo, /save FILE, /load FILE, /new, /help and /exit. Ctrl-C ends an answer.
    """
    from ismdata.generate import Sampling, Window, open_chat, recorded_mask, run_terminal

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    session = open_chat(
        model,
        mask=mask,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        window=Window(when_full=when_full, context=context),
    )
    run_terminal(session, trained=recorded_mask(model))
