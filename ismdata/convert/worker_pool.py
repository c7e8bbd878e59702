"""Where blocks of records are read: in threads, and in processes once it shows that reading them is work for Python.

Arrow and numpy let threads run side by side; Python's own code does not. Which of the two a block needs depends on its
records, so the first ones are read in threads and timed. What comes of a block is the same either way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Sized(Protocol):
    """What a block gave, told by how much it is."""

    @property
    def nbytes(self) -> int: ...


Result = TypeVar("Result", bound=Sized)

#: Processor seconds that threads have read for, and bytes that came of a second, from which on processes read: they
#: take a second to start, and what they read has to be handed over.
_SECONDS, _BYTES_A_SECOND = 2.0, 40e6


class WorkerPool:
    """A pool for `count` blocks at a time. processes: whether it may start any (the program's main file is imported in
    each, so that a script has to guard its own calls with `if __name__ == "__main__"`)."""

    def __init__(self, count: int, *, processes: bool) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count)
        self._may = processes and count > 1
        self._processes: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._seconds = self._bytes = 0.0

    def submit(self, read: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Have an item read. Both must be picklable where processes may read."""
        if self._processes is None and self._may and self._is_slow():
            context = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin)
        if self._processes is not None:
            return self._processes.submit(read, item)
        return self._threads.submit(self._timed, read, item)

    def submit_thread(self, call: Callable[[], Item]) -> Future[Item]:
        """Have a thread call what does not hold up Python."""
        return self._threads.submit(call)

    def _timed(self, read: Callable[[Item], Result], item: Item) -> Result:
        started = time.thread_time()
        result = read(item)
        with self._lock:
            self._seconds += time.thread_time() - started
            self._bytes += result.nbytes
        return result

    def _is_slow(self) -> bool:
        with self._lock:
            return self._seconds > _SECONDS and self._bytes < self._seconds * _BYTES_A_SECOND

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a new process: an interrupt is the parent's to handle, and what the parent leaves behind when it dies ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
