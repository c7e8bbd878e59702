"""Spans to intervals, targets, positions and block tables: the mathematics of the masks. numpy only."""

from ismdata.choices import MASKS, Mask
from ismdata.masks import varlen_tables
from ismdata.masks.glm_positions import (
    Block,
    block_positions,
    opened_runs,
    tiled_positions,
    token_positions,
)
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
    "Block",
    "IntArray",
    "Mask",
    "OffsetArray",
    "Tiling",
    "block_positions",
    "block_table",
    "dense",
    "intervals",
    "opened_runs",
    "position_ids",
    "targets",
    "tile",
    "tiled_intervals",
    "tiled_positions",
    "tiled_targets",
    "token_positions",
    "varlen_tables",
]
