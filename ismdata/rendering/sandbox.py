"""Limits of time and memory for code that someone else wrote, such as a chat template.

The time limit is an alarm (SIGALRM) in the main thread of a POSIX system, and a watchdog thread elsewhere. Both
interrupt Python only between bytecode instructions, so a long operation in C runs to its end; the memory limit keeps
most such operations short. The memory limit bounds the address space that the process may add (RLIMIT_AS). It works on
Linux in the main thread; elsewhere there is none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _OutOfTime(BaseException):
    """Not an Exception, so that the interrupted code does not catch it as an error of its own."""


def limited(call: Callable[[], T], *, seconds: float, memory: int) -> T:
    """Call a function within limits of time and memory.

    Handlers, timers and limits that were set before are restored.

    Args:
        call: What to call.
        seconds: How long it may take.
        memory: Bytes that it may allocate on top of what the process has.

    Returns:
        What `call` returns.

    Raises:
        TimeoutError: If it takes longer.
        MemoryError: If it needs more memory.
    """
    # The alarm fires at most once, and only while `call` runs or returns: never in this function, so that the `finally`
    # blocks below run in order. Context managers would not work: the alarm could fire inside their own code.
    in_main_thread = threading.current_thread() is threading.main_thread()
    timed = _with_alarm if in_main_thread and hasattr(signal, "setitimer") else _with_watchdog
    try:
        if in_main_thread and sys.platform == "linux":
            return _with_memory_limit(lambda: timed(call, seconds), memory)
        return timed(call, seconds)
    except _OutOfTime:
        raise TimeoutError(f"took more than {seconds:g} s") from None


def _with_alarm(call: Callable[[], T], seconds: float) -> T:
    """Call with SIGALRM as the time limit."""
    running = True

    def stop(number: int, frame: object) -> None:
        if running:
            raise _OutOfTime

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left = interval = 0.0
    try:
        try:
            left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
            return call()
        finally:
            running = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:  # restore the earlier alarm; if it should have fired meanwhile, it fires at once
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)


def _with_watchdog(call: Callable[[], T], seconds: float) -> T:
    """Call with a thread that raises an exception in this one after the time limit."""
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    thread = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    running, stopped = True, False

    def stop() -> None:
        nonlocal stopped
        with lock:
            if running:
                stopped = True
                raise_in(thread, ctypes.py_object(_OutOfTime))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        try:
            return call()
        finally:
            with lock:
                running = False
                if stopped:  # cancel the exception if it has not been raised yet: it would hit the caller
                    raise_in(thread, None)
    finally:
        timer.cancel()


#: Bytes of address space that other threads may add meanwhile: pyarrow's allocator reserves 1 GiB at a time, a thread
#: some 100 MB. The limit is the whole process's, so without this margin another thread could fail to open a file.
_OTHER_THREADS = (1 << 30) + (1 << 28)


def _with_memory_limit(call: Callable[[], T], memory: int) -> T:
    """Call with RLIMIT_AS `memory` bytes, and a margin, above the process's address space."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + memory + _OTHER_THREADS
    if any(set_ != resource.RLIM_INFINITY and set_ <= limit for set_ in (soft, hard)):
        return call()  # a stricter limit is in force
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


#: Seconds for which a measured address space is reused: measuring takes as long as a short rendering, and there are
#: thousands of these.
_REUSE_SECONDS = 0.02

_measured = (-_REUSE_SECONDS, 0)


def _address_space() -> int:
    """Bytes of the process's address space, now or a moment ago."""
    global _measured
    at, found = _measured
    now = time.monotonic()
    if now - at >= _REUSE_SECONDS:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # without a file object: this is called often
        try:
            found = int(os.read(statm, 64).split()[0]) * os.sysconf("SC_PAGESIZE")
        finally:
            os.close(statm)
        _measured = now, found
    return found
