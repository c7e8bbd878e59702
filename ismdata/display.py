"""What the commands say while they work: a progress bar on a terminal, plain lines elsewhere; all of it on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds between two plain lines of one stage.
_LINE_EVERY = 10.0


def note(text: str) -> None:
    """One line for the user, beside the output."""
    print(text, file=sys.stderr, flush=True)


class StageProgress:
    """Progress over named stages. Call it with a stage, how much is done, and the total (0 where it is not known)."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._lined: dict[str, float] = {}

    def __enter__(self) -> StageProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total or None)
            self._bar.update(self._tasks[stage], completed=done, total=total or None)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        if now - self._lined.setdefault(stage, now) >= _LINE_EVERY:
            self._lined[stage] = now
            note(f"{stage}: {done:,} of {total:,}" if total else f"{stage}: {done:,}")
