"""Launch parameters of the group norm, each with the reason for its value."""

from __future__ import annotations

TILE = 4096
"""Numbers per tile. With 4 warps this is 32 per thread, and the sums keep two values for each."""
WARPS = 4
PROGRAMS = 8
"""Programs per multiprocessor, over the whole batch. The number keeps enough loads in flight, and a
single image also fills the GPU."""
MAX_C = 1024
"""The largest number of channels of a map."""


def splits(B: int, rows: int, tile_rows: int, multiprocessors: int) -> int:
    """Return the number of programs per sample.

    It is never larger than the number of tiles, nor than the number of partial sums that one
    program adds.
    """
    return max(1, min(-(-rows // tile_rows), -(-PROGRAMS * multiprocessors // B), 512))
