"""Launch parameters of the GELU kernels, each with its reason. Nothing here was measured on a GPU yet; see kernels/README.md."""

from __future__ import annotations

FORWARD_BLOCK = 2048
"""elements a program: 16 a thread with 4 warps, two 16-byte loads each in bf16"""
FORWARD_WARPS = 4
COLUMNS = 1024
"""columns of a backward program: 8 a thread, one 16-byte load in bf16; its column sums stay in registers"""
BACKWARD_WARPS = 4
BACKWARD_STAGES = 3
PROGRAMS_PER_MULTIPROCESSOR = 4
"""backward programs over rows and columns together: enough loads in flight, few partial sums"""


def row_blocks(rows: int, hidden: int, multiprocessors: int) -> int:
    """Row groups of the backward kernel."""
    columns = -(-hidden // COLUMNS)
    return max(1, min(rows, -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // columns)))
