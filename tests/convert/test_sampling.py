"""Samples and splits: their sizes, their uniformity, and what must stay in one part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.digests import digests
from ismdata.convert.sampling import draw_sample, parse_split, split_numbers
from ismdata.errors import UsageError
from tests.support.talks import FEW, MANY, said, table, talk


@FEW
@given(st.integers(0, 200), st.integers(1, 250), st.integers(-3, 2**70), st.integers(1, 50))
def test_a_sample_has_n_and_does_not_depend_on_chunks(count: int, n: int, seed: int, at_once: int) -> None:
    chosen = draw_sample(count, n, seed)
    assert chosen.dtype == bool and len(chosen) == count and chosen.sum() == min(n, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ismdata.convert.sampling._CHUNK", at_once)
        assert np.array_equal(draw_sample(count, n, seed), chosen)


def test_a_larger_sample_contains_the_smaller() -> None:
    assert not (draw_sample(100, 10, 3) & ~draw_sample(100, 20, 3)).any()
    assert (draw_sample(100, 10, 3) != draw_sample(100, 10, 4)).any()


def test_samples_are_uniform() -> None:
    """Chi-square tests of single conversations and of adjacent pairs, for 2,000 fixed seeds."""
    chosen = np.array([draw_sample(40, 8, seed) for seed in range(2000)])
    expected = 2000 * 8 / 40
    drawn = chosen.sum(axis=0)
    assert ((drawn - expected) ** 2 / (expected * (1 - 8 / 40))).sum() * 39 / 40 < 72.1  # df 39: p = 0.001 at 72.05
    together = (chosen[:, ::2] & chosen[:, 1::2]).sum(axis=0)
    expected = 2000 * 8 * 7 / (40 * 39)
    assert ((together - expected) ** 2 / expected).sum() < 45.4  # df 19: p = 0.001 at 45.31


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.98/0.02", (0.98, 0.02)),
        ("0.8/0.1/0.1", (0.8, 0.1, 0.1)),
        (" .5/ 5e-1", (0.5, 0.5)),
        ("90/10", (0.9, 0.1)),
        ("80 / 10/10", (0.8, 0.1, 0.1)),
        ("97.5%/2.5 %", (0.975, 0.025)),
    ],
)
def test_split_is_parsed(text: str, parts: tuple[float, ...]) -> None:
    assert parse_split(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "0.9",
        "0.9/0.2",
        "1/0",
        "1.1/-0.1",
        "nan/1",
        "inf/0.1",
        "a/b",
        "0.25/0.25/0.25/0.25",
        "90/20",
        "9/1",
        "90%/0.1",
        "0/100",
    ],
)
def test_invalid_splits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected two or three positive shares"):
        parse_split(text)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(UsageError, match="--sample 0"):
        draw_sample(5, 0, 0)


@FEW
@given(MANY, st.lists(st.none() | st.sampled_from(["tree 1", "tree 2"]), min_size=12, max_size=12))
def test_a_duplicate_and_a_group_stay_in_one_part(rows: list[dict[str, Any]], groups: list[str | None]) -> None:
    found = split_numbers(digests(table(rows), roles=False), groups[: len(rows)], (0.5, 0.3, 0.2))
    sides: dict[str, int] = {}
    for row, name, side in zip(rows, groups, found.tolist(), strict=False):
        assert sides.setdefault(name or said(row, roles=False), side) == side


def test_split_parts_have_their_shares() -> None:
    found = split_numbers(digests(table([talk(f"talk {k}") for k in range(5000)])), [None] * 5000, (0.7, 0.2, 0.1))
    counts = np.bincount(found, minlength=3)
    expected = np.array([3500, 1000, 500])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # p = 0.001


def test_the_ends_of_the_range_are_in_the_first_and_the_last_part() -> None:
    ends = np.array([[0, 0], [2**63 - 1, 0], [2**63, 0], [2**64 - 1, 0]], np.uint64)
    assert split_numbers(ends, [None] * 4, (0.5, 0.5)).tolist() == [0, 0, 1, 1]
    assert split_numbers(ends, [None] * 4, (0.1, 0.2, 0.7)).tolist() == [0, 2, 2, 2]
