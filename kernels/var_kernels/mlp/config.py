"""Launch parameters of the MLP kernels, each with the reason for its value."""

from __future__ import annotations

FORWARD_BLOCK = 2048
"""Elements per program. With 4 warps this is 16 elements per thread, which bf16 reads with two
16-byte loads."""
FORWARD_WARPS = 4
COLUMNS = 1024
"""Columns per backward program. This is 8 columns per thread, which bf16 reads with one 16-byte
load. The column sums of the program stay in registers."""
BACKWARD_WARPS = 4
BACKWARD_STAGES = 3
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Backward programs per multiprocessor, over rows and columns together. The number keeps enough
loads in flight and produces few partial sums."""


def row_blocks(rows: int, hidden: int, multiprocessors: int) -> int:
    """Return the number of row groups of the backward kernel."""
    columns = -(-hidden // COLUMNS)
    return max(1, min(rows, -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // columns)))
