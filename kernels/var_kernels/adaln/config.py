"""Launch parameters of the AdaLN kernels, each with its reason. Nothing here was measured on a GPU yet; see kernels/README.md."""

from __future__ import annotations

from dataclasses import dataclass

ROOM = 80 * 1024
"""shared memory for the four rows in flight: fits the 99 KiB of small GPUs"""
MAX_C = 4096
"""Widest row: one program holds it in registers; 8192 spill."""


@dataclass(frozen=True)
class AdaLNConfig:
    """Warps and pipeline depth for one width."""

    block_c: int
    """the power of two from C up: lanes past C are masked, they cost no bytes"""
    forward_warps: int
    backward_warps: int
    backward_stages: int = 3
    """tl.range with 3 stages turns the row loads into cp.async prefetch; a plain loop loads and waits at every row"""


def config_for(C: int, itemsize: int = 2) -> AdaLNConfig:
    """Parameters for rows of C elements of `itemsize` bytes.

    Backward: 8 warps keep 2048 lanes at 125 registers a thread without spills (compiled ahead of time for sm_90), so two programs fit on
    a multiprocessor, the number that `splits` plans with. Rows past 2048 take 16.
    """
    block = 1 << max(5, (C - 1).bit_length())
    stages = next((s for s in (3, 2) if 4 * (s - 1) * block * itemsize <= ROOM), 1)
    return AdaLNConfig(block, 4 if block <= 2048 else 8, min(16, max(1, block // 256)), stages)


def splits(B: int, L: int, multiprocessors: int) -> int:
    """Programs a sample in the backward pass: two a multiprocessor over the batch, never more than rows."""
    return max(1, min(L, -(-2 * multiprocessors // B)))
