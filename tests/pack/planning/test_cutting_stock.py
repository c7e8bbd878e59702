"""Column generation against exhaustive search, and against the relaxation over all patterns at once."""

from __future__ import annotations

import itertools

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.pack.planning import choose as best_bins
from ismdata.pack.planning import cutting_stock, exact_completion
from ismdata.pack.planning.best_fit import best_fit_decreasing, fewest_bins
from ismdata.pack.planning.cutting_stock import column_generation
from ismdata.pack.planning.plan import plan
from tests.pack.planning.test_plan import fewest_bins as fewest_by_trying
from tests.pack.planning.test_plan import histogram, rooms_of
from tests.support.relaxed_bound import relaxed_bound

lengths_of_a_few = st.lists(st.integers(1, 24), min_size=1, max_size=9)


def laid(bins, seq_len):
    """Documents of each length in all bins together."""
    found = np.zeros(seq_len + 1, np.int64)
    np.add.at(found, bins.length, bins.times * bins.count[bins.owner])
    return found


def every_pattern(lengths, seq_len):
    """All patterns of these documents that fit into a bin, as numbers of documents of each length."""
    kinds = sorted(set(lengths))
    counts = itertools.product(*(range(lengths.count(kind) + 1) for kind in kinds))
    return kinds, [times for times in counts if sum(map(int.__mul__, times, kinds)) <= seq_len and any(times)]


def relaxation(lengths, seq_len):
    """The oracle: the relaxation over all patterns at once."""
    kinds, patterns = every_pattern(lengths, seq_len)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    uses = [solver.addVariable(lb=0.0, obj=1.0) for _ in patterns]
    for k, kind in enumerate(kinds):
        solver.addConstr(sum(use * times[k] for use, times in zip(uses, patterns, strict=True)) >= lengths.count(kind))
    solver.run()
    return solver.getInfo().objective_function_value


@given(lengths_of_a_few)
@settings(max_examples=60, deadline=None)
def test_the_bound_is_that_of_the_relaxation_over_every_pattern(lengths):
    found = relaxed_bound(histogram(lengths, 24), 24)
    assert found == np.ceil(relaxation(lengths, 24) - 1e-6)
    assert found <= fewest_by_trying(lengths, 24)


@given(lengths_of_a_few)
@settings(max_examples=100, deadline=None)
def test_a_few_documents_take_the_fewest_bins(lengths):
    """The relaxation rounded up is the optimum except for rare cases, which need longer sequences than these."""
    found = column_generation(histogram(lengths, 24), 24)
    assert found.rows == fewest_by_trying(lengths, 24)


@given(
    st.sampled_from([128, 113]).flatmap(
        lambda seq_len: st.tuples(st.lists(st.integers(1, seq_len), min_size=1, max_size=200), st.just(seq_len))
    ),
    st.sampled_from([1 << 21, 1 << 9, 1 << 6]),
)
@settings(max_examples=150, deadline=None)
def test_column_generation_places_every_document(corpus, cells):
    """With exact lengths, and with lengths rounded up to units that may not divide a sequence evenly."""
    lengths, seq_len = corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting_stock, "_MOST_CELLS", cells)
        found = column_generation(histogram(lengths, seq_len), seq_len)
    assert laid(found, seq_len).tolist() == histogram(lengths, seq_len).tolist()
    rooms = rooms_of(found, seq_len)
    assert rooms[0] >= 0
    assert rooms[-1] < seq_len
    assert len(rooms) >= fewest_bins(histogram(lengths, seq_len), seq_len)
    if cells == 1 << 21:
        assert len(rooms) <= best_fit_decreasing(histogram(lengths, seq_len), seq_len).rows


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(0, 1 << 30)), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_patterns_have_the_returned_worth(kinds):
    """The knapsack against exhaustive search."""
    kinds = sorted({size: (size, stock, price) for size, stock, price in kinds}.values())
    size, stock, prices = (np.array(column, np.int64) for column in zip(*kinds, strict=True))
    worth, patterns = cutting_stock._worthwhile(size, stock, prices, 30)
    every = itertools.product(*(range(there + 1) for there in stock.tolist()))
    possible = [times for times in every if np.dot(times, size) <= 30]
    assert worth == max(int(np.dot(times, prices)) for times in possible)
    for pattern in patterns.tolist():
        assert tuple(pattern) in possible
        assert np.dot(pattern, prices) > 1 << 30
    if worth > (1 << 30) * 1.001:
        assert worth in (patterns * prices).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [1024, 2048, 2560])
def test_sequences_of_a_few_documents_are_filled(seq_len):
    """Best-fit and exact completion need at least 1 % more than the lower bound."""
    lengths = np.random.default_rng(0).normal(0.3 * seq_len, 0.08 * seq_len, 900).clip(40, seq_len).astype(int)
    counted = histogram(lengths, seq_len)
    bound = fewest_bins(counted, seq_len)
    earlier = min(make(counted, seq_len).rows for make in best_bins._ALGORITHMS[:2])
    assert earlier > 1.01 * bound
    assert plan(lengths, seq_len=seq_len, seed=0).rows <= 1.002 * bound


def test_exact_completion_stops_early_if_bins_cannot_be_filled(monkeypatch):
    """Such bins take the most time, and column generation finds better plans."""
    counted = histogram(np.random.default_rng(0).normal(614, 160, 900).clip(40, 2048).astype(int), 2048)
    fill, rooms = exact_completion._fill_bin, []

    def filled(*given):
        lengths = fill(*given)
        rooms.append(2048 - sum(lengths))
        return lengths

    monkeypatch.setattr(exact_completion, "_fill_bin", filled)
    exact_completion.exact_completion(counted, 2048)
    assert len(rooms) < 0.9 * fewest_bins(counted, 2048)
    assert sum(rooms[:-1]) <= counted @ np.arange(2049) / 2000 < sum(rooms)


@pytest.mark.slow
def test_rounded_lengths_leave_few_gaps(monkeypatch):
    lengths = np.random.default_rng(0).normal(2500, 900, 2000).clip(40, 8192).astype(int)
    counted = histogram(lengths, 8192)
    units = []
    dive = cutting_stock._dive
    monkeypatch.setattr(
        cutting_stock, "_dive", lambda *given: units.append(8192 // (len(given[0]) - 1)) or dive(*given)
    )
    assert column_generation(counted, 8192).rows <= 1.004 * fewest_bins(counted, 8192)
    assert units[0] > 1


def test_the_same_bins_each_time():
    lengths = np.random.default_rng(3).normal(300, 90, 300).clip(20, 1024).astype(int)
    one, again = (column_generation(histogram(lengths, 1024), 1024) for _ in range(2))
    assert all(np.array_equal(getattr(one, name), getattr(again, name)) for name in ("count", "owner", "length"))


@pytest.mark.parametrize("solved", [0, 3, 12])
def test_a_failing_solver_costs_no_document(monkeypatch, solved):
    """It fails after some solutions; bins fixed by then are kept."""
    solve, calls = cutting_stock.Relaxation.solve, itertools.count()

    def giving_up(relaxation):
        if next(calls) >= solved:
            raise cutting_stock.NotSolved
        return solve(relaxation)

    monkeypatch.setattr(cutting_stock.Relaxation, "solve", giving_up)
    counted = histogram(np.random.default_rng(3).normal(300, 90, 300).clip(20, 1024).astype(int), 1024)
    found = column_generation(counted, 1024)
    assert laid(found, 1024).tolist() == counted.tolist()
    assert found.rows <= best_fit_decreasing(counted, 1024).rows


def test_a_solver_without_a_solution_raises():
    counted = histogram([3, 5] * 4, 8)
    relaxation = cutting_stock.Relaxation(counted, best_fit_decreasing(counted, 8))
    relaxation._solver.setOptionValue("simplex_iteration_limit", 0)
    with pytest.raises(cutting_stock.NotSolved):
        relaxation.solve()
