"""SIGTERM and Ctrl-C during a run: remembered until the step is done, with a line that says what happens now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ismdata.display import Reporter

#: The signals that end a run after its current step.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: What a run does, as a line about a signal says it. An evaluation is left unfinished.
STEP = "finishing this step"
EVALUATION = "leaving the evaluation"
CHECKPOINT = "finishing the checkpoint"


class StopSignals:
    """Remembers SIGTERM and Ctrl-C until the step is done.

    Args:
        alone: Whether this is the only process; a second Ctrl-C then ends it at once.
        reporter: Receives a line for the first signal.
    """

    def __init__(self, *, alone: bool, reporter: Reporter) -> None:
        self.received: int | None = None
        self.alone = alone
        self.reporter = reporter
        self._doing = STEP
        self._process = os.getpid()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context a signal is only remembered. Outside the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Within this context, the line about a signal says that the run is `doing` this."""
        former, self._doing = self._doing, doing
        try:
            yield
        finally:
            self._doing = former

    def _remember(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            return  # a data loading process, which inherited the handler and ends with this one
        if self.received is not None:
            if number == signal.SIGINT and self.alone:
                raise KeyboardInterrupt
            return
        self.received = number
        again = ", press again to stop now" if number == signal.SIGINT and self.alone else ", then stopping"
        text = f"{'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: {self._doing}{again}"
        # In a thread: the signal may have interrupted a write to the same terminal.
        threading.Thread(target=self.reporter.note, args=(text,), daemon=True).start()
