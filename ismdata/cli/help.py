"""How the commands are added to the command line: their help, in groups and with examples, and their errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from rich.markup import escape
from rich.text import Text
from typer.models import ParameterInfo

from ismdata.cli.common import explained
from ismdata.display import draw
from ismdata.suggestions import FOREIGN_COMMANDS, did_you_mean, foreign_name, near

Function = TypeVar("Function", bound=Callable[..., Any])

#: Typer's panels need this many columns: with fewer it would cut names of options, so the help is plain text there.
_PANEL_WIDTH = 80


def _terminal_width() -> int:
    """The width that rich will take: COLUMNS, else that of the terminal, else 80."""
    if (columns := os.environ.get("COLUMNS", "")).isdigit():
        return int(columns)
    for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # closed, or no terminal
            return os.get_terminal_size(stream.fileno()).columns or _PANEL_WIDTH  # type: ignore[union-attr]
    return _PANEL_WIDTH


MARKUP: Literal["rich"] | None = "rich" if _terminal_width() >= _PANEL_WIDTH else None


def help_text(text: str) -> str:
    """A text for Typer's help: paragraphs that wrap at any width, in which nothing is markup."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))
    plain = "\n\n".join(paragraphs)
    return escape(plain) if MARKUP else plain


def examples_text(lines: Sequence[str]) -> str:
    """The end of a command's help: lines to copy."""
    if MARKUP:
        return escape("Examples:\n" + "\n".join(f"  {line}" for line in lines))
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _print_help(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        _draw_help(context)
        raise typer.Exit()


def _draw_help(context: typer.Context) -> None:
    if text := context.get_help():  # empty where Typer has drawn it itself
        draw(Text(text), whole_lines=True)


def help_if_alone(context: typer.Context) -> None:
    """Show the help of a group of commands that was called without one, which is an error."""
    if context.invoked_subcommand is None:
        _draw_help(context)
        raise typer.Exit(2)


#: `--help` of our own: Typer's shows that it takes a `<bool>`.
Help = Annotated[
    bool,
    typer.Option("--help", "-h", help="Show this message and exit.", metavar="", is_eager=True, callback=_print_help),
]


def add_command(
    app: typer.Typer,
    name: str,
    command: Callable[..., Any],
    *,
    examples: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Add a command.

    Args:
        app: Where to add it.
        name: Its name.
        command: Its function. The docstring is its help.
        examples: Command lines to copy.
        groups: Title -> names of the parameters below it. Others stand below `Options`.
    """
    group_of = {parameter: title for title, members in (groups or {}).items() for parameter in members}
    app.command(name, help=help_text(command.__doc__ or ""), epilog=examples_text(examples), add_help_option=False)(
        _described(explained(command), group_of)
    )


def _described(command: Callable[..., Any], group_of: Mapping[str, str]) -> Callable[..., Any]:
    """A command whose parameters say what they take, and that has `--help`."""

    @functools.wraps(command)
    def wrapped(*args: Any, show_help: bool = False, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    parameters = [
        parameter.replace(annotation=_annotation(name, parameter.annotation, group_of.get(name)))
        for name, parameter in signature.parameters.items()
    ]
    shown = inspect.Parameter("show_help", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Help)
    wrapped.__signature__ = signature.replace(parameters=[*parameters, shown])  # type: ignore[attr-defined]
    return wrapped


def _annotation(name: str, annotation: Any, group: str | None) -> Any:
    """The annotation of a parameter, completed: what it takes, its group, its choices."""
    if get_origin(annotation) is not Annotated:
        return annotation
    taken, *extras = get_args(annotation)
    info = copy.copy(next(extra for extra in extras if isinstance(extra, ParameterInfo)))
    value, choices = _value_name(taken)
    if info.metavar is None:
        info.metavar = name.upper() if isinstance(info, typer.models.ArgumentInfo) else value
    text = info.help or ""
    if choices and not all(re.search(rf"\b{re.escape(choice)}\b", text) for choice in choices):
        text = f"{text} One of {', '.join(choices)}."
    info.help = help_text(text)
    info.rich_help_panel = group
    return Annotated[taken, info]


def _value_name(taken: Any) -> tuple[str, tuple[str, ...]]:
    """What the help calls a value of this type, and the values themselves where they are few."""
    kinds = [kind for kind in get_args(taken) if kind is not NoneType] if get_origin(taken) is not Literal else []
    kind = kinds[0] if kinds else taken
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return "WORD", get_args(kind)
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT"), ()


# ---- errors of the call ----


def call_error(error: Any, words: Sequence[str]) -> str:
    """Say what is wrong with a call, in place of Typer's own message.

    Args:
        error: What Typer raised: an exception with `format_message` and, mostly, `ctx`.
        words: The call, without the program's name.

    Returns:
        One line: what was found, what was expected, and what to type next.
    """
    context = getattr(error, "ctx", None)
    command = words[0] if words and not words[0].startswith("-") else ""
    path = f"ismdata {command}".strip() if context is None else context.command_path
    more = f"`{path} --help` shows what it takes"
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        return f"{path} has no option {error.option_name}.{_option_meant(error.option_name, context)} {more}"
    parameter = getattr(error, "param", None)
    if parameter is not None and hasattr(error, "param_type"):
        return f"{path} lacks {_name(parameter)}: {_first_sentence(parameter.help)} {more}"
    message = error.format_message().replace("Value error, ", "")
    if parameter is not None:
        return f"{path}: {_bad_value(parameter, message, words)} {more}"
    if found := re.match(r"No such command '(.*?)'\.", message):
        return f"{path} has no command {found[1]!r}.{_command_meant(found[1], context)} {more}"
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message, re.DOTALL):
        return f"{path}: {found[1]!r} is left over; a value with spaces needs quotes. {more}"
    return f"{path}: {message.rstrip('.')}. {more}"


def _first_sentence(text: str | None) -> str:
    """The start of a help text, without the backslashes of markup."""
    return re.sub(r"\\(?=\[)", "", text or "").partition(". ")[0].rstrip(".") + "."


def _name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name) if parameter.param_type_name == "argument" else parameter.opts[0]


def _bad_value(parameter: Any, message: str, words: Sequence[str]) -> str:
    """What is wrong with the value of an option or argument."""
    name = _name(parameter)
    quoted = re.findall(r"'([^']*)'", message.partition(":")[2])
    if " is not one of " in message and quoted:
        return f"{name} is {quoted[0]!r}; expected one of {', '.join(quoted[1:])}.{did_you_mean(quoted[0], quoted[1:])}"
    for kind, expected in (("int", "a whole number"), ("number", "a number"), ("float", "a number")):
        if f"valid {kind}" in message:
            given = [after for word, after in itertools.pairwise(words) if word in parameter.opts]
            given += [word.partition("=")[2] for word in words if word.partition("=")[0] in parameter.opts]
            return f"{name} is {given[0]!r}; expected {expected}." if given else f"{name}: expected {expected}."
    return f"{name}: {message.partition(': ')[2].rstrip('.')}."


def _option_meant(option: str, context: Any) -> str:
    """What an unknown option may have meant: one of another trainer, a near one, one of another command."""
    here = context.info_name
    options = {
        name: {each for parameter in command.params for each in parameter.opts if each.startswith("--")}
        for name, command in getattr(context.find_root().command, "commands", {}).items()
    }
    own = {each for parameter in context.command.params for each in parameter.opts if each.startswith("--")}
    if foreign := foreign_name(option):
        meant, source = foreign
        command, _, rest = meant.partition(" ")
        if command not in options:
            return f" {option} is known from {source}; here {meant}."
        same = rest in own or command == here
        return f" {option} of {source} is {rest if same else f'`ismdata {meant}`'} here."
    if other := [name for name, names in options.items() if option in names]:
        return f" It is an option of `ismdata {other[0]}`."
    meant_here = near(option, own)
    return f" Did you mean {meant_here}?" if meant_here else ""


def _command_meant(word: str, context: Any) -> str:
    commands = context.command.commands
    if context.parent is None and word in FOREIGN_COMMANDS:
        return f" Did you mean `ismdata {FOREIGN_COMMANDS[word]}`?"
    meant = near(word, commands)
    if meant is not None:
        return f" Did you mean `{context.command_path} {meant}`?"
    if Path(word).exists():
        return f" To read a corpus, type `ismdata convert {word} -o converted`."
    return f" Expected one of {', '.join(commands)}."
