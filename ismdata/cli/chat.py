"""The command `ismdata chat`. It imports torch only when it runs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ismdata.choices import Mask
from ismdata.display import TerminalReporter


def chat_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that `ismdata train` wrote, or, with --mask, any model: folder, peft adapters, GGUF file or "
            "hub name."
        ),
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
    chat_template: Annotated[
        str | None,
        typer.Option(help="Jinja file or name of a built-in template, for a tokenizer that has none."),
    ] = None,
    no_history: Annotated[
        bool,
        typer.Option(
            "--no-history", help="Do not keep what is typed. Else it is in ~/.local/state/ismdata/chat_history."
        ),
    ] = False,
) -> None:
    """Talk with a model in the terminal. The KV cache is kept from turn to turn.

    Commands are /undo, /save FILE, /load FILE, /new, /help and /exit. Ctrl-C ends an answer, Ctrl-D leaves. Answers go
    to stdout, all else to stderr; from a pipe, each line is a question.
    """
    from ismdata.rendering import check_model_name

    check_model_name(model, presets=False)  # before torch is imported, which takes seconds

    from ismdata.cli.screens import open_screen
    from ismdata.generate import Sampling, Window, open_chat, recorded_mask, run_terminal

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with TerminalReporter() as reporter:
        session = open_chat(
            model,
            mask=mask,
            system=system,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            window=Window(when_full=when_full, context=context),
            chat_template=chat_template,
            reporter=reporter,
        )
    screen = open_screen(history=not no_history)
    errors = run_terminal(session, screen, trained=recorded_mask(model))
    if errors and not screen.interactive:
        raise typer.Exit(1)
