"""Where Arrow's memory comes from, and when it goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

#: The largest block that glibc keeps when it is freed (DEFAULT_MMAP_THRESHOLD_MAX of mallopt(3)), less its header.
_LARGEST_KEPT_BYTES = (32 << 20) - 8192


@contextmanager
def kept_memory() -> Iterator[None]:
    """Arrow's buffers come from the C library while the body runs, which keeps what is freed for the next ones.

    Arrow's own pool hands the pages of a large buffer back as soon as it is free, and the system clears every page that
    it hands out again: some tenth of the time of `pack`, whose batches are some megabytes each.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def keep_freed_blocks() -> None:
    """Have the C library keep blocks of up to 32 MiB when they are freed, for the next ones of their size.

    glibc gives the pages of a large block back at once, and the system clears them anew for the next: half the time of
    work that takes and frees arrays of some 100 KB. What counts as large grows with the blocks that were freed
    (mallopt(3), M_MMAP_THRESHOLD), so one is freed here, untouched. Other C libraries do not mind.
    """
    np.empty(_LARGEST_KEPT_BYTES, np.uint8)


def give_back() -> None:
    """Return memory that nothing uses any more to the system: allocators keep it, in pieces, and it counts as taken.

    That of Arrow's pool and, where the C library can do that (glibc), of the process.
    """
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
