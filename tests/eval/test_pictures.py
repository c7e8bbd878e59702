"""Perplexity by turn and by source, in CSV files and as pictures."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest

from ismdata.eval.answers import Answers
from ismdata.eval.bootstrap import Bootstrap
from ismdata.eval.likelihood import likelihood
from ismdata.eval.pictures import OTHER, Row, by_source, write_groups

BOOTSTRAP = Bootstrap(resamples=20, seed=0)


def answers_of(*names, targets=4):
    count = len(names)
    numbers = np.zeros(count, np.int64)
    return Answers(
        conversation=list(names),
        digest=[f"{number:032x}" for number in range(count)],
        turn=np.array([1 + number % 3 for number in range(count)], np.int64),
        row=numbers,
        document=numbers,
        start=numbers,
        end=numbers + targets,
        targets=numbers + targets,
    )


def rows_of(found):
    return [Row(name=str(name), facts=each.as_json()) for name, each in found.items()]


def test_answers_are_grouped_by_the_corpus_in_their_ids():
    answers = answers_of("a-1", "a-1", "a-2", "b-1", "b-2", "c-9", "c0ffee")
    losses = np.array([4.0, 8.0, 0.0, 2.0, 2.0, 1.0, 3.0])
    found = by_source(answers, losses, BOOTSTRAP)
    assert list(found) == ["a", "b", OTHER]  # by targets, then by name; only one conversation is named like c
    assert {name: each.conversations for name, each in found.items()} == {"a": 2, OTHER: 2, "b": 2}
    assert {name: each.nll.value for name, each in found.items()} == {"a": 1.0, OTHER: 0.5, "b": 0.5}


def test_ids_without_a_corpus_give_no_sources():
    assert by_source(answers_of("one", "two", "x-1"), np.ones(3), BOOTSTRAP) == {}


def test_files_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    hostile = ["$x^2$", "a\nb", "\u202e\udcff", "<b>&", "long" * 40]
    answers = answers_of(*(f"{name}-{number}" for name in hostile for number in range(1, 4)))
    losses = np.arange(15.0)
    groups = {"turn": likelihood(answers, losses, BOOTSTRAP)[1], "source": by_source(answers, losses, BOOTSTRAP)}
    for group, found in groups.items():
        assert write_groups(tmp_path, group, rows_of(found), mask="ism")
        with (tmp_path / f"perplexity-by-{group}.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(found)
        for line, each in zip(lines, found.values(), strict=True):
            assert float(line["perplexity"]) == pytest.approx(np.exp(each.nll.value))
            assert int(line["target_tokens"]) == each.target_tokens
        assert (tmp_path / f"perplexity-by-{group}.png").read_bytes()[1:4] == b"PNG"


def test_without_matplotlib_the_numbers_are_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = likelihood(answers_of("a", "b"), np.ones(2), BOOTSTRAP)[1]
    assert not write_groups(tmp_path, "turn", rows_of(found), mask="causal")
    assert [path.name for path in tmp_path.iterdir()] == ["perplexity-by-turn.csv"]
    assert write_groups(tmp_path, "source", [], mask="causal")
