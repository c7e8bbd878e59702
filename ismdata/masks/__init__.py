"""Spans to intervals, targets, positions and block tables: the mathematics of the masks. numpy only."""

from ismdata.choices import MASKS, Mask
from ismdata.masks.intervals import (
    ANSWER,
    BLOCK_SIZE,
    PROMPT,
    QUERY,
    IntArray,
    OffsetArray,
    Tiling,
    block_table,
    dense,
    intervals,
    position_ids,
    targets,
    tile,
    tiled_intervals,
    tiled_targets,
)

__all__ = [
    "ANSWER",
    "BLOCK_SIZE",
    "MASKS",
    "PROMPT",
    "QUERY",
    "IntArray",
    "Mask",
    "OffsetArray",
    "Tiling",
    "block_table",
    "dense",
    "intervals",
    "position_ids",
    "targets",
    "tile",
    "tiled_intervals",
    "tiled_targets",
]
