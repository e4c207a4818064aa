"""Launch parameters of block-causal attention, each with its reason. Nothing here was measured on a GPU yet; see kernels/README.md."""

from __future__ import annotations

from dataclasses import dataclass


def max_width(itemsize: int) -> int:
    """Widest head, for elements of so many bytes: wider ones spill hundreds of bytes, or do not fit small GPUs (compiled ahead of time)."""
    return 128 if itemsize <= 2 else 64


@dataclass(frozen=True)
class AttentionConfig:
    """Tile sides (queries, keys), warps and pipeline depth of the forward kernel and of the two backward kernels."""

    block_m: int = 64
    """with 64 rows, tiles end where scales end: at L = 680 the pairs computed are 1.13 of the useful ones; with 128, 1.29 to 1.60"""
    block_n: int = 64
    warps: int = 4
    """64 x 64 with 4 warps takes 165 registers a thread on sm_90: three programs share a multiprocessor and hide each other's softmax"""
    stages: int = 3
    backward_warps: int = 4
    backward_stages: int = 2
    backward_inner: int = 64
    """rows of the tiles that the backward loops run over; 32 where there is neither wgmma nor tcgen05 (Ampere, Ada, sm_120): there the
    operands of a product lie in registers, and 64 spill"""


def config_for(D: int, generation: int, itemsize: int = 2) -> AttentionConfig:
    """For heads of D channels on a GPU generation (9: Hopper). Wide heads and float32 take smaller pipelines, so that tiles and
    accumulators fit, also into the 99 KiB of shared memory of small GPUs."""
    if D > 64 or itemsize > 2:
        return AttentionConfig(block_n=32, stages=2, warps=8, backward_warps=8, backward_stages=1, backward_inner=32)
    return AttentionConfig(backward_inner=32) if generation not in (9, 10) else AttentionConfig()
