"""Memory that nothing uses any more goes back to the system. Allocators keep it, in pieces, and it counts as taken."""

from __future__ import annotations

import ctypes

import pyarrow as pa


def give_back() -> None:
    """Return free memory of Arrow's pool and, where the C library can do that (glibc), of the process."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
