"""Launch parameters of the MLP kernels, each with the reason for its value."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class ProductConfig:
    """Tile sizes, warps and pipeline stages of our own matrix products."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    """The number of tiles to go down before going one tile across. Eight rows of tiles of x stay in
    the L2 cache."""
    warps: int = 8
    stages: int = 3
    descriptor: bool = True
    """Whether loads go through tensor descriptors (TMA). Ampere has no TMA: on Ampere, descriptors
    compile to code that spills registers to the stack."""


def product_config(generation: int, backward: bool) -> ProductConfig:
    """Return the configuration for a GPU generation.

    The generations are 8 (Ampere), 9 (Hopper), 10 (Blackwell) and 12, which has as little shared
    memory as Ampere. The backward epilogue holds more values, so that 128 columns spill.
    """
    block_n = 64 if backward else 128
    return (
        ProductConfig(block_n=block_n)
        if generation in (9, 10)
        else ProductConfig(block_n=block_n, block_k=32, descriptor=False)
    )
