"""A reporter that keeps what it is told."""

from __future__ import annotations


class Recorder:
    """Keeps notes as lines, and progress as (stage, done, total)."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))
