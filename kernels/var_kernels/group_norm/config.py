"""Launch parameters of the group norm, each with its reason."""

from __future__ import annotations

TILE = 4096
"""numbers of a tile: 32 a thread with 4 warps, of which the sums keep two each"""
WARPS = 4
PROGRAMS = 8
"""programs a multiprocessor over the batch: enough loads in flight; one image alone fills the GPU too"""
MAX_C = 1024
"""most channels of a map"""


def splits(B: int, rows: int, tile_rows: int, multiprocessors: int) -> int:
    """Programs a sample: never more than tiles, and no more partial sums than one program adds up."""
    return max(1, min(-(-rows // tile_rows), -(-PROGRAMS * multiprocessors // B), 512))
