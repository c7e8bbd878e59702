"""The threads and random numbers that planning uses.

Work is divided into pieces that fit into a processor's cache. What a piece does depends on its number and the seed, not
on the thread that runs it or on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np

from ismdata.concurrency import run_pieces

#: Runs `work(0)` to `work(pieces - 1)`, given `work` and `pieces`.
Runner = Callable[[Callable[[int], object], int], None]

#: What random numbers are drawn for: each purpose has its own stream per seed.
DOCUMENT_ORDER, CHUNK_ORDER, ROW_SECTIONS, ROW_ORDER, DOCUMENTS_IN_ROWS = range(5)


def thread_count() -> int:
    """Threads to use; capped at 16, where memory bandwidth is the bottleneck."""
    return min(os.cpu_count() or 1, 16)


@contextmanager
def worker_threads() -> Iterator[Runner]:
    """Start threads; yields the function that runs pieces of work on them."""
    threads = thread_count()
    with ThreadPoolExecutor(threads) as executor:
        yield partial(run_pieces, executor=executor, threads=threads)


def random_stream(seed: int, *purpose: int) -> np.random.Generator:
    """Return the random numbers for a purpose."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=purpose)))
