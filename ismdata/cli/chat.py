"""`ismdata chat` on the command line: options in, one call. Heavy imports stand inside, as in main.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ismdata.choices import Mask


def chat_command(
    model: Annotated[
        Path, typer.Argument(help="A folder that `ismdata train` wrote, or a model of transformers with --mask.")
    ],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens, 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample from tokens with this share of the likeliest one's.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 tokens that stand in the conversation become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn at a temperature above 0.")] = 0,
    mask: Annotated[
        Mask | None, typer.Option(help="To talk under another mask than the one recorded when the model was trained.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="The most tokens of the conversation. Default: all of the model's positions.")
    ] = None,
    when_full: Annotated[
        Literal["stop", "drop-oldest", "sirllm"],
        typer.Option(
            help="When the conversation has more tokens: stop; let the oldest turns leave; or let the least surprising "
            "tokens leave, as SirLLM does."
        ),
    ] = "stop",
) -> None:
    """Talk with a model in the terminal, turn after turn. The KV cache survives from turn to turn.

    /undo, /save FILE, /load FILE, /new, /help and /exit are commands; Ctrl-C ends an answer.
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
    run_terminal(session, trained=recorded_mask(model, override=mask))
