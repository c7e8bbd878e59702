"""Limits of time and memory around a program that someone else wrote, such as a chat template.

The time limit is an alarm (SIGALRM) in the main thread of a POSIX system, and a watching thread elsewhere. Both reach
Python code only between two of its steps, so one long step in C is waited for; the memory limit is what keeps most such
steps short. The memory limit is on the address space that the process may add meanwhile (RLIMIT_AS). It holds on Linux
in the main thread; elsewhere there is none.
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
    """Not an Exception, so that what it interrupts does not take it for an error of its own and go on."""


def limited(call: Callable[[], T], *, seconds: float, memory: int) -> T:
    """What `call` returns, if it takes at most `seconds`, and at most `memory` bytes more than the process has.

    Raises TimeoutError, MemoryError and what `call` raises. Handlers, timers and limits that were set before are set
    again afterwards.
    """
    # One alarm rings once, and only while `call` runs or is being left: never in this function, so that whatever it
    # interrupts is undone in order. Context managers would not do: the alarm could ring in their own machinery.
    in_main_thread = threading.current_thread() is threading.main_thread()
    timed = _with_alarm if in_main_thread and hasattr(signal, "setitimer") else _watched
    try:
        if in_main_thread and sys.platform == "linux":
            return _with_memory_limit(lambda: timed(call, seconds), memory)
        return timed(call, seconds)
    except _OutOfTime:
        raise TimeoutError(f"took more than {seconds:g} s") from None


def _with_alarm(call: Callable[[], T], seconds: float) -> T:
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
        if left:  # someone else's alarm goes on, and rings at once if it should have rung meanwhile
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)


def _watched(call: Callable[[], T], seconds: float) -> T:
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
                if stopped:  # takes it back where it has not arrived yet: later it would hit the caller
                    raise_in(thread, None)
    finally:
        timer.cancel()


def _with_memory_limit(call: Callable[[], T], memory: int) -> T:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + memory
    if any(set_ != resource.RLIM_INFINITY and set_ <= limit for set_ in (soft, hard)):
        return call()  # a stricter one is in force
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


#: Seconds for which a reading of the address space holds. Renderings come by the thousand, and to read it takes as
#: long as a short one of them.
_READING_HOLDS = 0.02

_reading = (-_READING_HOLDS, 0)


def _address_space() -> int:
    """Bytes of address space that the process has, or had a moment ago."""
    global _reading
    at, found = _reading
    now = time.monotonic()
    if now - at >= _READING_HOLDS:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # plainly: this is done often
        try:
            found = int(os.read(statm, 64).split()[0]) * os.sysconf("SC_PAGESIZE")
        finally:
            os.close(statm)
        _reading = now, found
    return found
