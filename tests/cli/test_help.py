"""Help: whole at any width, with examples that parse, and completion that a shell understands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer.main
from rich.text import Text

from ismdata.cli.main import app
from tests.support.command_line import ismdata

GROUP = typer.main.get_command(app)
COMMANDS = {
    **{(name,): command for name, command in GROUP.commands.items() if not hasattr(command, "commands")},
    **{("bench", name): command for name, command in GROUP.commands["bench"].commands.items()},
}

#: Prints the help of every command as JSON. The width is decided when the command line is imported.
EVERY_HELP = """
import json, sys
from tests.support.command_line import ismdata
print(json.dumps({" ".join(words): ismdata(*words, "--help").stdout for words in json.loads(sys.argv[1])}))
"""


def helps(columns: int | None, **environment: str) -> dict[str, str]:
    """The help of every command, by its words, in a terminal of that width."""
    calls = json.dumps([(), *COMMANDS, ("bench",)])
    variables = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | environment
    variables |= {} if columns is None else {"COLUMNS": str(columns)}
    found = subprocess.run(
        [sys.executable, "-c", EVERY_HELP, calls],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(found.stdout))


def bare(text: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


@pytest.mark.parametrize("columns", [60, 80, 120, None])
def test_nothing_is_cut_or_swallowed(columns: int | None) -> None:
    found = helps(columns)
    for words, command in COMMANDS.items():
        text = found[" ".join(words)]
        width = columns or 80
        examples = text.partition("Examples:")[0]
        assert all(len(line) <= width for line in examples.splitlines()), words
        assert "<bool>" not in text.lower()
        assert "boolean" not in text.lower()
        for parameter in command.params:
            for name in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]:
                assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), (words, name)
            lines = " ".join(line.strip(" │") for line in text.splitlines())
            for word in Text.from_markup(parameter.help).plain.split() if columns != 60 else ():
                assert word in lines, (words, parameter.name, word)


def test_help_fits_a_terminal_of_ascii() -> None:
    found = helps(80, PYTHONIOENCODING="ascii")
    assert all(text for text in found.values())


def test_no_help_text_is_markup() -> None:
    """Escaped, each text is read back by rich as it was written; brackets and `:names:` arrive whole."""
    assert "'ismdata[fast]'" in bare(helps(80)["pack"])
    for command in COMMANDS.values():
        for text in (command.help, command.epilog, *(parameter.help for parameter in command.params)):
            assert Text.from_markup(text).plain == text.replace("\\[", "[")
            assert not Text.from_markup(text).spans


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_short_and_long_help_and_groups(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert ismdata(*words, "-h") == ismdata(*words, "--help")
    assert ismdata(*words, "-h").code == 0
    options = [each for each in command.params if each.param_type_name == "option"]
    ungrouped = [each.opts[0] for each in options if each.rich_help_panel is None]
    assert len(ungrouped) <= 9, ungrouped


def example_lines() -> list[str]:
    return [
        line.strip()
        for command in COMMANDS.values()
        for line in command.epilog.replace("\\[", "[").splitlines()
        if line.startswith("  ")
    ]


def test_every_command_has_an_example() -> None:
    firsts = [shlex.split(line)[1:3] for line in example_lines()]
    for words in COMMANDS:
        assert any(tuple(first[: len(words)]) == words for first in firsts), words


@pytest.mark.parametrize("line", example_lines())
def test_an_example_parses(line: str) -> None:
    assert len(line) <= 78
    program, *words = shlex.split(line)
    assert program == "ismdata"
    group = GROUP.commands["bench"] if words[0] == "bench" else GROUP
    name, *rest = words[1:] if words[0] == "bench" else words
    context = group.commands[name].make_context(name, rest)
    assert not context.args


def test_version() -> None:
    from ismdata import __version__

    assert ismdata("--version").stdout.strip() == f"ismdata {__version__}"


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_without_a_command_the_help_is_shown(words: tuple[str, ...]) -> None:
    ended = ismdata(*words)
    assert ended.code == 2
    assert "Commands" in ended.stdout
    assert ended.stderr == ""


# ---- completion ----


def run(*words: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "ismdata", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ismdata pa", ["pack"]),
        ("ismdata pack --see", ["--seed"]),
        ("ismdata pack --mask ", ["ism", "causal", "prefix"]),
        ("ismdata bench la", ["latency"]),
    ],
)
def test_bash_is_told_what_completes_a_word(line: str, expected: list[str]) -> None:
    place = str(len(line.split(" ")) - 1)
    found = run(_ISMDATA_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=place)
    assert found.split() == expected


@pytest.mark.slow
def test_bash_completes_with_the_installed_script(tmp_path) -> None:
    """The script is installed into a home, read by bash, and its function called as bash does."""
    (tmp_path / "ismdata").write_text(f'#!/bin/sh\nexec {sys.executable} -m ismdata "$@"\n', encoding="utf-8")
    (tmp_path / "ismdata").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = run(_ISMDATA_COMPLETE="source_bash")
    (tmp_path / "script").write_text(script, encoding="utf-8")
    code = "source script; COMP_WORDS=(ismdata pack --ov); COMP_CWORD=2; _ismdata_completion ismdata; "
    code += 'echo "${COMPREPLY[@]}"'
    found = subprocess.run(
        ["bash", "-c", code],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["--over-long", "--overwrite"]
