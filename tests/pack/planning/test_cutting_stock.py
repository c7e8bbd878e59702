"""Column generation against trying everything, and against the relaxation with every filling written out."""

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


def every_filling(lengths, seq_len):
    """All ways to fill a bin with some of these documents, as how many of each length, by trying everything."""
    kinds = sorted(set(lengths))
    counts = itertools.product(*(range(lengths.count(kind) + 1) for kind in kinds))
    return kinds, [times for times in counts if sum(map(int.__mul__, times, kinds)) <= seq_len and any(times)]


def relaxation(lengths, seq_len):
    """The oracle: the relaxation over all fillings at once."""
    kinds, fillings = every_filling(lengths, seq_len)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    uses = [solver.addVariable(lb=0.0, obj=1.0) for _ in fillings]
    for k, kind in enumerate(kinds):
        solver.addConstr(sum(use * times[k] for use, times in zip(uses, fillings, strict=True)) >= lengths.count(kind))
    solver.run()
    return solver.getInfo().objective_function_value


@given(lengths_of_a_few)
@settings(max_examples=60, deadline=None)
def test_the_bound_is_that_of_the_relaxation_over_every_filling(lengths):
    found = relaxed_bound(histogram(lengths, 24), 24)
    assert found == np.ceil(relaxation(lengths, 24) - 1e-6)
    assert found <= fewest_by_trying(lengths, 24)


@given(lengths_of_a_few)
@settings(max_examples=100, deadline=None)
def test_a_few_documents_take_as_few_bins_as_can_be(lengths):
    """The relaxation rounded up is the optimum for all but very odd lengths, and those are longer than these."""
    found = column_generation(histogram(lengths, 24), 24)
    assert found.rows == fewest_by_trying(lengths, 24)


@given(
    st.sampled_from([128, 113]).flatmap(
        lambda seq_len: st.tuples(st.lists(st.integers(1, seq_len), min_size=1, max_size=200), st.just(seq_len))
    ),
    st.sampled_from([1 << 21, 1 << 9, 1 << 6]),
)
@settings(max_examples=150, deadline=None)
def test_column_generation_lays_down_the_histogram(corpus, cells):
    """With lengths as they are, and rounded up to units, which may not go into a sequence evenly."""
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
def test_fillings_are_worth_what_they_are_said_to_be(kinds):
    """The knapsack against trying everything."""
    kinds = sorted({size: (size, stock, price) for size, stock, price in kinds}.values())
    size, stock, prices = (np.array(column, np.int64) for column in zip(*kinds, strict=True))
    worth, fillings = cutting_stock._worthwhile(size, stock, prices, 30)
    every = itertools.product(*(range(there + 1) for there in stock.tolist()))
    possible = [times for times in every if np.dot(times, size) <= 30]
    assert worth == max(int(np.dot(times, prices)) for times in possible)
    for filling in fillings.tolist():
        assert tuple(filling) in possible
        assert np.dot(filling, prices) > 1 << 30
    if worth > (1 << 30) * 1.001:
        assert worth in (fillings * prices).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [1024, 2048, 2560])
def test_conversations_of_which_a_sequence_holds_a_few_leave_no_gaps(seq_len):
    """Best-fit and exact completion are one and more in a hundred above what is possible."""
    lengths = np.random.default_rng(0).normal(0.3 * seq_len, 0.08 * seq_len, 900).clip(40, seq_len).astype(int)
    counted = histogram(lengths, seq_len)
    bound = fewest_bins(counted, seq_len)
    earlier = min(make(counted, seq_len).rows for make in best_bins._ALGORITHMS[:2])
    assert earlier > 1.01 * bound
    assert plan(lengths, seq_len=seq_len, seed=0).rows <= 1.002 * bound


def test_exact_completion_gives_up_where_it_cannot_do_well(monkeypatch):
    """Bins that cannot be filled take the most time, and column generation does better."""
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
def test_rounded_lengths_leave_hardly_any_gaps(monkeypatch):
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
def test_what_the_solver_cannot_do_costs_no_document(monkeypatch, solved):
    """It gives up after some solutions: what was decided on stays."""
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


def test_a_solver_that_ends_without_a_solution_is_noticed():
    counted = histogram([3, 5] * 4, 8)
    relaxation = cutting_stock.Relaxation(counted, best_fit_decreasing(counted, 8))
    relaxation._solver.setOptionValue("simplex_iteration_limit", 0)
    with pytest.raises(cutting_stock.NotSolved):
        relaxation.solve()
