"""The options of `convert`: what is refused, and what the index records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ismdata.convert.options import Cleaning, ConvertOptions, Selection
from ismdata.convert.pipeline import convert
from ismdata.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"exclude": ("(",)}, "--exclude '\\('", id="open group"),
        pytest.param({"exclude": ("fine", "\udc80")}, "--exclude", id="surrogate"),
        pytest.param({"exclude": ("a{99999999999999999999}",)}, "--exclude", id="huge count"),
        pytest.param({"min_turns": -1}, "--min-turns -1", id="negative"),
        pytest.param({"dedup": "all"}, "--dedup is 'all'", id="unknown"),
    ],
)
def test_invalid_cleaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cleaning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 0}, "--sample 0: expected 1 or more"),
        ({"split": "0.9"}, "--split 0.9: found 1 share; expected two or three"),
        ({"split": "0.9/0.2"}, "adds up to 1.1"),
    ],
)
def test_invalid_selections_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Selection(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "--format csv: unknown format; expected auto, "),
        ({"format": "messages", "mapping": Path("my.toml")}, "--format messages and --mapping exclude each other"),
        ({"roles": {"bot": "boss"}}, "--role bot=boss: 'boss' is not a role"),
        ({"assistant": "third"}, "--assistant is 'third'; expected one of second, first, both"),
        ({"tree": "some"}, "--tree is 'some'; expected one of all, best"),
        ({"preference": "better"}, "--preference is 'better'; expected one of chosen, rejected"),
        ({"workers": -1}, "--workers -1: expected 0"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ConvertOptions(**options)


def test_fields_replace_those_of_the_options(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"messages": [{"role": "narrator", "content": "Once."}]}\n')
    options = ConvertOptions(format="lists", roles={"narrator": "user"})
    assert convert([str(corpus)], tmp_path / "out", options, format="messages").written == 1
    with pytest.raises(TypeError, match="colour"):
        convert([str(corpus)], tmp_path / "out", options, colour="red", overwrite=True)


def test_all_options_that_change_the_output_are_recorded() -> None:
    """Workers and processes do not change it."""
    recorded = ConvertOptions(selection=Selection(against=("a",)), roles={"b": "user", "a": "user"}).recorded()
    assert {**recorded, "role": list(recorded["role"])} == {
        "format": "auto",
        "mapping": None,
        "role": ["a", "b"],
        "assistant": None,
        "tree": "all",
        "preference": None,
        "join": False,
        "dedup": None,
        "min_turns": 0,
        "exclude": (),
        "against": ["a"],
        "sample": None,
        "seed": 0,
        "split": None,
        "splits": "keep",
    }
