"""Streams that return a few bytes per read, and the records that are framed from them."""

from __future__ import annotations

import io

from ismdata.convert.sources.framing import ByteQueue


class ShortReads(io.BytesIO):
    """A stream of which each read returns at most `size` bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.size)


def queue_of(data: bytes, size: int = 1 << 20, name: str = "x") -> ByteQueue:
    """Bytes to be framed, of which each read returns at most `size`."""
    return ByteQueue(ShortReads(data, size), name)
