"""Work behind one's back: in order, all of it over at the end, and what it raises is raised."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from ismdata.behind import BehindThread, side_by_side


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
    assert list(side_by_side(call, range(9))) == [10 * k for k in range(9)]
    assert sorted(done) == list(range(9))
    assert list(side_by_side(call, [])) == []


def test_no_more_than_two_are_ahead() -> None:
    begun: list[int] = []
    with closing(side_by_side(begun.append, range(9))) as results:
        for k, _ in enumerate(results):
            assert len(begun) <= k + 2
            if k == 3:
                break
    assert len(begun) <= 5  # closed: the rest is left out


def test_what_a_call_raises_is_raised_in_its_turn() -> None:
    results = side_by_side(lambda k: 1 // (2 - k), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_calls_are_done_one_after_the_other() -> None:
    done: list[int] = []
    with BehindThread() as behind:
        for k in range(20):
            behind(done.append, k)
    assert done == list(range(20))
    with pytest.raises(ZeroDivisionError), BehindThread() as behind:
        behind(divmod, 1, 0)
