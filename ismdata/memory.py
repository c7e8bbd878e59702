"""How Arrow and the C library allocate memory, and when freed memory returns to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

#: The largest block that glibc keeps when it is freed (DEFAULT_MMAP_THRESHOLD_MAX in mallopt(3)), minus its header.
_LARGEST_KEPT_BYTES = (32 << 20) - 8192


@contextmanager
def kept_memory() -> Iterator[None]:
    """Make Arrow allocate from the C library inside the `with` block, which reuses freed blocks.

    Arrow's own pool returns the pages of a large buffer to the system when it is freed, and the system zeroes them
    again for the next buffer. This takes about a tenth of the time of `pack`, whose batches have a few megabytes each.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def keep_freed_blocks() -> None:
    """Make the C library keep freed blocks of up to 32 MiB, for later blocks of their size.

    By default, glibc returns the pages of a large block to the system, which zeroes them again for the next block. This
    takes half the time of work that allocates and frees arrays of about 100 KB. The size from which a block counts as
    large grows with the blocks that are freed (M_MMAP_THRESHOLD in mallopt(3)), so this function frees a large block
    that was never written. Other C libraries are not affected.
    """
    np.empty(_LARGEST_KEPT_BYTES, np.uint8)


def give_back() -> None:
    """Return freed memory, which allocators keep, from Arrow's pool and from the C library (glibc) to the system."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
