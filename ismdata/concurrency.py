"""Ordered, bounded work in background threads.

Results come in the order of the items, and only a few items are in memory at a time. What a call raises in its thread
is raised again where its result is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")

#: Calls of a BackgroundThread that may be pending. Their arguments stay in memory until they are done.
_MAX_PENDING = 2


class BackgroundThread:
    """A single thread that runs calls in the order in which they are submitted.

    `submit` blocks while two calls are pending. What a call raises is raised by a later `submit`, or at the end of the
    `with` block, which waits for all calls. If the block itself raises, calls that have not started are cancelled.

    Example:
        >>> with BackgroundThread() as thread:
        ...     thread.submit(print, "written")
        written
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[Future[object]] = deque()

    def submit(self, call: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
        """Run `call(*arguments, **options)` in the thread. Raises what an earlier call raised."""
        self._wait(_MAX_PENDING - 1)
        self._pending.append(self._executor.submit(call, *arguments, **options))

    def _wait(self, pending: int) -> None:
        """Wait until at most `pending` calls are pending. Raises what one of the others raised."""
        while len(self._pending) > pending or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> BackgroundThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._wait(0)
        finally:
            self._executor.shutdown(cancel_futures=True)


def map_in_order(
    call: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    submit: Callable[[Callable[[Item], Result], Item], Future[Result]],
    pending: int,
) -> Generator[Result, None, None]:
    """Yield `call(item)` for each item, in the order of the items, while later calls run.

    Args:
        call: The function to run.
        items: Its arguments. An item is taken when fewer than `pending` calls are pending.
        submit: Starts a call, such as `executor.submit`.
        pending: The most calls that are submitted and not yielded yet, at least 1.

    Yields:
        The results. A call that raised raises in its turn; calls that have not started by then are cancelled, as they
        are when the generator is closed.

    Example:
        >>> with ThreadPoolExecutor(2) as threads:
        ...     list(map_in_order(abs, [-3, 2], submit=threads.submit, pending=2))
        [3, 2]
    """
    futures: deque[Future[Result]] = deque()
    try:
        for item in items:
            futures.append(submit(call, item))
            if len(futures) >= pending:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def map_on_two_threads(call: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Yield `call(item)` for each item, in the order of the items, while two threads compute the next two.

    Close the generator to stop early; this waits for the calls that run.

    Args:
        call: The function to run.
        items: Its arguments.

    Yields:
        The results, as `map_in_order` does.

    Example:
        >>> list(map_on_two_threads(abs, [-3, 2]))
        [3, 2]
    """
    with ThreadPoolExecutor(2) as threads:
        yield from map_in_order(call, items, submit=threads.submit, pending=2)


def delay_by_one(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item one step late, so that its background work overlaps the computation of the next item.

    Args:
        items: Items whose making starts work elsewhere.

    Yields:
        The same items in the same order. If `items` raises, the item before is yielded first.

    Example:
        >>> list(delay_by_one("abc"))
        ['a', 'b', 'c']
    """
    last: list[Item] = []
    try:
        for item in items:
            yield from last
            last = [item]
    except Exception:
        yield from last
        raise
    yield from last


def run_pieces(work: Callable[[int], object], pieces: int, *, executor: Executor, threads: int) -> None:
    """Call `work(0)` to `work(pieces - 1)` on several threads, and return when all calls are done.

    Each thread takes the next piece when it is done with one. Submitting one call per thread, not per piece, matters:
    submitting thousands of calls takes as long as computing a few pieces.

    Args:
        work: The function to run. Its calls must not depend on their order.
        pieces: The number of calls.
        executor: Where the threads come from.
        threads: How many of them to use.

    Raises:
        BaseException: What a call raised.
    """
    numbers, lock = iter(range(pieces)), Lock()

    def next_piece() -> int | None:
        with lock:
            return next(numbers, None)

    def work_off(_: int) -> None:
        for piece in iter(next_piece, None):
            work(piece)

    for _ in executor.map(work_off, range(threads)):
        pass
