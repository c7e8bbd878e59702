"""Runs on several processes, as `torchrun` starts them: the first reports and writes, and all fail together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def is_first_process() -> bool:
    """Whether this process reports and writes for the run.

    Returns:
        True if it is the only process, or the first that torchrun started (RANK 0).
    """
    return os.environ.get("RANK", "0") == "0"


def together(work: Callable[[], Result]) -> Result:
    """Call `work` on every process, and raise on all of them if it raised on any.

    If only one process raised, the others would wait for it forever.

    Args:
        work: The function to call. Every process must call `together`.

    Returns:
        What `work` returned on this process.

    Raises:
        BaseException: What `work` raised on this process, otherwise what it raised on the first process that failed.
    """
    import torch.distributed as dist

    error: BaseException | None = None
    results: list[Result] = []
    try:
        results.append(work())
    except Exception as raised:  # raised again below
        error = raised
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[BaseException | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = error or next((each for each in errors if each is not None), None)
    if error is not None:
        raise error
    return results[0]


def on_first_process(work: Callable[[], Result]) -> Result | None:
    """Call `work` on the first process while the others wait, and raise on all of them if it raised.

    Args:
        work: The function to call. Every process must call `on_first_process`.

    Returns:
        What `work` returned on the first process, None on the others.
    """
    return together(lambda: work() if is_first_process() else None)
