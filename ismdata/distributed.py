"""Several processes of one run, as `torchrun` starts them: the first one speaks and writes, and all fail together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def is_first_process() -> bool:
    """Whether this process speaks for the run: it is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def together(work: Callable[[], Result]) -> Result:
    """Do the same work on every process, and raise on all of them what any of them raised.

    A process that fails by itself would leave the others waiting for it. Each raises its own error where it has one,
    else that of the first process that has.
    """
    import torch.distributed as dist

    error: BaseException | None = None
    results: list[Result] = []
    try:
        results.append(work())
    except Exception as raised:  # whatever it is, it is raised again below
        error = raised
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[BaseException | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = error or next((each for each in errors if each is not None), None)
    if error is not None:
        raise error
    return results[0]


def on_first_process(work: Callable[[], Result]) -> Result | None:
    """Do work on the first process alone, the others waiting; what it raises is raised on all of them."""
    return together(lambda: work() if is_first_process() else None)
