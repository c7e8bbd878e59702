"""The names of other trainers: each leads to an option that exists, or to a sentence."""

from __future__ import annotations

import re

import pytest
import typer.main

from ismdata.cli.main import app
from ismdata.suggestions import FOREIGN_COMMANDS, FOREIGN_NAMES, did_you_mean, foreign_name, near

COMMANDS = typer.main.get_command(app).commands
NAMED = re.compile(r"([a-z]+) (--[a-z-]+|[A-Z]+)")


def names(command: str) -> set[str]:
    """The options and arguments of a command, as they are typed."""
    return {name for parameter in COMMANDS[command].params for name in (*parameter.opts, parameter.metavar)}


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_what_is_suggested_exists(name: str) -> None:
    meant, source = FOREIGN_NAMES[name]
    assert source
    assert name == name.lower()
    assert "-" not in name
    if found := NAMED.fullmatch(meant):
        assert found[2] in names(found[1])
    for command, option in re.findall(r"`ismdata ([a-z]+) ?(--[a-z-]+)?`", meant):
        assert not option or option in names(command)
    # an option of ours with the same name would be read, never looked up
    assert f"--{name.replace('_', '-')}" not in (names("train") if meant.startswith("train") else ())


@pytest.mark.parametrize("word", ["--max-steps", "max_steps", "--max_steps", "MAX_STEPS", "training.max_steps"])
def test_any_spelling_is_understood(word: str) -> None:
    assert foreign_name(word) == ("train --steps", "TRL, Axolotl, LLaMA-Factory")


def test_what_is_nothing_like_it_is_not_suggested() -> None:
    assert near("zzzz", ["ism", "causal"]) is None
    assert did_you_mean("zzzz", ["ism", "causal"]) == ""
    assert did_you_mean("ISM", ["ism", "causal"]) == " Did you mean 'ism'?"
    assert foreign_name("zzzz") is None


def test_commands_of_other_tools_lead_to_ours() -> None:
    for name, meant in FOREIGN_COMMANDS.items():
        assert name not in COMMANDS
        assert meant.startswith("--") or meant.split()[0] in COMMANDS
