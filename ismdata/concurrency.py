"""Work that goes on behind one's back: writing and hashing while the next batch is made, and batches side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")

#: Calls that may wait. What they hold stays in memory as long.
_MOST_WAITING = 2


class BehindThread:
    """Calls done by one thread in the order in which they are given; all are over when the `with` block is.

    The caller is held up where more than a few wait. What a call raises is raised where a later one is given, or at the
    end of the block. Where the block raises, calls that have not begun are left out.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[object]] = deque()

    def __call__(self, call: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
        """Have a call done. Raises what an earlier one raised."""
        self._wait(_MOST_WAITING - 1)
        self._waiting.append(self._thread.submit(call, *arguments, **options))

    def _wait(self, left: int) -> None:
        """Return when at most `left` calls are not done yet. Raises what one of the others raised."""
        while len(self._waiting) > left or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def __enter__(self) -> BehindThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._wait(0)
        finally:
            self._thread.shutdown(cancel_futures=True)


def side_by_side(call: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """What `call` gives for each item, in their order: two threads make the next ones meanwhile.

    Raises what a call raises, in its turn. Whoever stops before the end closes the iterator, which waits for both.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(2) as threads:
        try:
            for item in items:
                waiting.append(threads.submit(call, item))
                if len(waiting) == 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
