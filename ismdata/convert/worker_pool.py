"""Workers that read blocks: threads first, and processes once the threads turn out to wait for each other.

Arrow and numpy release the GIL, Python code does not. Which one a block needs depends on its records, so the first
blocks are read in threads and timed. The results are the same in both.
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
    """A result with a size in bytes."""

    @property
    def nbytes(self) -> int: ...


Result = TypeVar("Result", bound=Sized)

#: Processes are started after this many CPU seconds of threads, if these gave fewer bytes per second than this.
#: Processes take a second to start, and their results must be copied.
_SECONDS, _BYTES_PER_SECOND = 2.0, 40e6


class WorkerPool:
    """A pool that works on `count` items at a time.

    Args:
        count: Number of threads, and of processes.
        processes: Whether processes may be started. Each imports the main module of the program, so a script must guard
            its calls by `if __name__ == "__main__"`.
    """

    def __init__(self, count: int, *, processes: bool) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count)
        self._may_start_processes = processes and count > 1
        self._processes: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._seconds = self._bytes = 0.0

    def submit(self, call: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Start `call(item)`. Both must be picklable if processes are allowed."""
        if self._processes is None and self._may_start_processes and self._is_slow():
            context = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self.count, mp_context=context, initializer=_start_process)
        if self._processes is not None:
            return self._processes.submit(call, item)
        return self._threads.submit(self._timed, call, item)

    def submit_thread(self, call: Callable[[], Item]) -> Future[Item]:
        """Start a call in a thread, for calls that release the GIL."""
        return self._threads.submit(call)

    def _timed(self, call: Callable[[Item], Result], item: Item) -> Result:
        started = time.thread_time()
        result = call(item)
        with self._lock:
            self._seconds += time.thread_time() - started
            self._bytes += result.nbytes
        return result

    def _is_slow(self) -> bool:
        with self._lock:
            return self._seconds > _SECONDS and self._bytes < self._seconds * _BYTES_PER_SECOND

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Initialize a worker process: the parent handles interrupts, and the worker exits if the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
