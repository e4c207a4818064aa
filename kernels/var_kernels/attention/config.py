"""Launch parameters of block-causal attention, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


def max_width(itemsize: int) -> int:
    """Widest head, for elements of so many bytes: wider ones spill hundreds of bytes, or do not fit small GPUs (compiled ahead of time)."""
    return 128 if itemsize <= 2 else 64


@dataclass(frozen=True)
class Tile:
    """One kernel: rows of the tile that a program owns, rows of the tiles it loops over, warps, pipeline depth."""

    rows: int = 64
    inner: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class AttentionConfig:
    """Queries own the tiles of `forward` and `queries`, keys those of `keys`, the other backward kernel."""

    forward: Tile = Tile(inner=32, stages=3)
    keys: Tile = Tile(stages=1)
    queries: Tile = Tile(inner=32, stages=3)


LONG = 1024
"""keys from which on the forward pass takes more of them at a time"""


def config_for(D: int, generation: int, itemsize: int = 2, keys: int = 0) -> AttentionConfig:
    """For heads of D channels on a GPU generation (9: Hopper), for so many keys.

    Measured on an H200, d30 (kernels/bench/results/h200-sweep.json): forward at L = 680 0.386 ms with 32 keys at a time, 0.435 with 64,
    0.422 with 128; at L = 2240 0.715, 0.702 and 0.654. Tiles of 128 queries take 1.3 to 1.4 times as long, 8 warps for 64 queries longer.

    With tiles of 64 rows, tiles end where scales end: at L = 680 the pairs computed are 1.13 of the useful ones; with 128, 1.29 to 1.60.
    Wide heads and float32 take smaller pipelines, so that tiles and accumulators fit, also into the 99 KiB of shared memory of small
    GPUs; where there is neither wgmma nor tcgen05 (Ampere, Ada, sm_120) the operands of a product lie in registers, and 64 inner rows
    spill.
    """
    if D > 64 or itemsize > 2:
        small = Tile(rows=32, inner=32, warps=8, stages=1)
        return AttentionConfig(Tile(inner=32, warps=8), small, Tile(inner=32, warps=8, stages=1))
    if generation not in (9, 10):
        return AttentionConfig(Tile(inner=32, stages=3), Tile(inner=32), Tile(inner=32, stages=1))
    return AttentionConfig(Tile(inner=128, stages=3)) if keys >= LONG else AttentionConfig()
