"""Launch parameters of the AdaLN kernels, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

ROOM = 80 * 1024
"""shared memory for the rows in flight: fits the 99 KiB of small GPUs"""
MAX_C = 4096
"""Widest row: one program holds it in registers; 8192 spill."""
STAGES = 3
"""tl.range with 3 stages turns the row loads into cp.async prefetch; a plain loop loads and waits at every row"""

A_ROW_EACH = 1 << 20
"""as many programs as rows"""


@dataclass(frozen=True)
class Rows:
    """One kernel: warps of a program, rows in flight, programs a multiprocessor."""

    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class AdaLNConfig:
    """Both passes for one width."""

    block_c: int
    """the power of two from C up: lanes past C are masked, they cost no bytes"""
    forward: Rows
    """without a gate"""
    gated: Rows
    backward: Rows


def config_for(C: int, itemsize: int = 2) -> AdaLNConfig:
    """Parameters for rows of C elements of `itemsize` bytes: 16 channels a thread, so that a sum over a row crosses few warps, and programs
    for the threads of two programs of 4 warps and 2048 channels (backward, by registers), four forward.

    Measured on an H200 at B = 32, L = 680 (kernels/bench/results/h200-sweep.json). Backward: C = 1024 0.081 ms with 2 warps, C = 1920
    0.141 with 4 warps, 0.179 with 8. Forward without a gate: 0.031 and 0.056 ms, a row a program 0.036 and 0.063; with a gate the other
    way round: 0.053 and 0.098, a row a program 0.050 and 0.089.
    """
    block = 1 << max(5, (C - 1).bit_length())
    warps = min(16, max(1, block // 512))

    def rows(loads: int, most: int) -> Rows:
        stages = next((s for s in (STAGES, 2) if loads * (s - 1) * block * itemsize <= ROOM), 1)
        return Rows(warps, stages, max(1, most // warps))

    return AdaLNConfig(block, rows(1, 16), Rows(warps, 1, A_ROW_EACH), rows(4, 8))


def splits(B: int, L: int, programs: int) -> int:
    """Programs a sample, `programs` over the batch, never more than rows."""
    return max(1, min(L, -(-programs // B)))
