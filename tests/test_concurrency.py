"""Background threads: results in order, few items in memory, errors raised where results are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext

import pytest

from ismdata.concurrency import BackgroundThread, delay_by_one, map_on_two_threads, run_pieces


def test_results_come_in_order() -> None:
    done: list[int] = []

    def call(k: int) -> int:
        if k == 0:
            assert second_began.wait(10)  # so that the second is through before the first
        else:
            second_began.set()
        done.append(k)
        return 10 * k

    second_began = threading.Event()
    assert list(map_on_two_threads(call, range(9))) == [10 * k for k in range(9)]
    assert sorted(done) == list(range(9))
    assert list(map_on_two_threads(call, [])) == []


def test_at_most_two_results_are_computed_ahead() -> None:
    begun: list[int] = []
    with closing(map_on_two_threads(begun.append, range(9))) as results:
        for k, _ in enumerate(results):
            assert len(begun) <= k + 2
            if k == 3:
                break
    assert len(begun) <= 5  # closed: the rest is left out


def test_a_call_that_raises_raises_in_its_turn() -> None:
    results = map_on_two_threads(lambda k: 1 // (2 - k), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_calls_run_one_after_the_other() -> None:
    done: list[int] = []
    with BackgroundThread() as thread:
        for k in range(20):
            thread.submit(done.append, k)
    assert done == list(range(20))
    with pytest.raises(ZeroDivisionError), BackgroundThread() as thread:
        thread.submit(divmod, 1, 0)


def test_items_come_one_step_late_and_those_before_a_failure_come() -> None:
    asked: list[int] = []

    def items(failing: bool) -> Iterator[int]:
        for k in range(3):
            asked.append(k)
            yield k
        if failing:
            raise ValueError("the fourth")

    for failing in (False, True):
        asked.clear()
        seen = []
        with pytest.raises(ValueError, match="the fourth") if failing else nullcontext():
            for k in delay_by_one(items(failing)):
                assert len(asked) == min(k + 2, 3)
                seen.append(k)
        assert seen == [0, 1, 2]


def test_pieces_run_once_each_and_errors_are_raised() -> None:
    done: list[int] = []
    with ThreadPoolExecutor(3) as executor:
        run_pieces(done.append, 100, executor=executor, threads=3)
        assert sorted(done) == list(range(100))
        with pytest.raises(ZeroDivisionError):
            run_pieces(lambda piece: 1 // (piece - 5), 10, executor=executor, threads=2)
