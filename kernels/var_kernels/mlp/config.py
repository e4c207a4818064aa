"""Launch parameters of the MLP kernels, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class ProductConfig:
    """Tiles, warps and pipeline of our own matrix products."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    """tiles down before one across: eight rows of tiles of x stay in the L2 cache"""
    warps: int = 8
    stages: int = 3
    descriptor: bool = True
    """load through tensor descriptors (TMA), which Ampere does not have: there they compile to a stack of spills"""


def product_config(generation: int, backward: bool) -> ProductConfig:
    """For a GPU generation (8: Ampere, 9: Hopper, 10: Blackwell; 12 has a small shared memory, as Ampere). The backward epilogue holds
    more: 128 columns spill."""
    block_n = 64 if backward else 128
    return ProductConfig(block_n=block_n) if generation in (9, 10) else ProductConfig(block_n=block_n, block_k=32, descriptor=False)
