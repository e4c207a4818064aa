"""Launch parameters of block-causal attention, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


def max_width(itemsize: int) -> int:
    """The widest head for elements of `itemsize` bytes.

    Wider heads spill hundreds of bytes, or do not fit small GPUs (compiled ahead of time).
    """
    return 128 if itemsize <= 2 else 64


@dataclass(frozen=True)
class Tile:
    """One kernel: rows of the tile that a program owns, rows of the tiles that it loops over,
    warps, stages of the pipeline, and the most registers per thread (None: as many as it takes)."""

    rows: int = 64
    inner: int = 64
    warps: int = 4
    stages: int = 2
    registers: int | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """The forward kernel and both backward kernels. Programs of `forward` and `queries` own tiles
    of queries, those of `keys` tiles of keys."""

    forward: Tile = Tile(inner=32, stages=3)
    keys: Tile = Tile(stages=1)
    queries: Tile = Tile(inner=32, stages=3)


LONG = 1024
"""number of keys from which on the forward pass loads more of them at a time"""


def config_for(D: int, generation: int, itemsize: int = 2, keys: int = 0) -> AttentionConfig:
    """The settings for heads of D channels on a GPU generation (9: Hopper) and a number of keys.

    Measured on an H200, d30 (kernels/bench/results/h200-sweep.json): the forward pass at L = 680
    takes 0.386 ms with 32 keys at a time, 0.435 with 64 and 0.422 with 128; at L = 2240 0.715,
    0.702 and 0.654. Tiles of 128 queries take 1.3 to 1.4 times as long, and 8 warps for 64 queries
    take longer too.

    Tiles of 64 rows end where scales end: at L = 680 1.13 pairs are computed for each useful one,
    with 128 rows 1.29 to 1.60. Wide heads and float32 get smaller pipelines, so that tiles and
    accumulators fit, also into the 99 KiB of shared memory of small GPUs. Without wgmma and tcgen05
    (Ampere, Ada, sm_120) the operands of a product are in registers, and larger tiles spill. A tile
    of 64 float32 queries spills 368 bytes, one of 32 none.
    """
    if D > 64 or itemsize > 2:
        small = Tile(rows=32, inner=32, warps=8, stages=1)
        queries = small if itemsize > 2 else Tile(inner=32, warps=8, stages=1)
        return AttentionConfig(Tile(inner=32, warps=8), small, queries)
    if generation not in (9, 10):
        queries = Tile(inner=32, stages=1)
        return AttentionConfig(Tile(inner=32, stages=3), Tile(rows=32), queries)
    # On Blackwell 128 keys at a time spill 32 bytes.
    many = Tile(inner=128 if generation == 9 else 64, stages=3)
    return AttentionConfig(many) if keys >= LONG else AttentionConfig()
