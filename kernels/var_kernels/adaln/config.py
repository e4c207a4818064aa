"""Launch parameters of the AdaLN kernels, each with the reason for its value."""

from __future__ import annotations

from dataclasses import dataclass

ROOM = 80 * 1024
"""Bytes of shared memory for the rows in flight, which fit the 99 KiB of small GPUs."""
MAX_C = 4096
"""The widest row. One program holds a row in registers; 8192 channels spill."""
STAGES = 3
"""Pipeline stages. tl.range with 3 stages turns the loads of the rows into a cp.async prefetch,
whereas a plain loop loads and waits at every row."""

A_ROW_EACH = 1 << 20
"""A number of programs that gives each row its own program."""


@dataclass(frozen=True)
class Rows:
    """The settings of one kernel: warps per program, rows in flight, programs per
    multiprocessor."""

    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class AdaLNConfig:
    """The settings of both passes for one width."""

    block_c: int
    """The smallest power of two that is at least C. Lanes past C are masked and cost no bytes."""
    forward: Rows
    """The forward pass without a gate."""
    gated: Rows
    """The forward pass with a gate."""
    backward: Rows


def config_for(C: int, itemsize: int = 2) -> AdaLNConfig:
    """Return the parameters for rows of C elements of `itemsize` bytes.

    Each thread handles 16 channels, so that a sum over a row crosses few warps. A multiprocessor
    runs the threads of two programs of 4 warps and 2048 channels in the backward pass, which
    registers limit, and those of four such programs in the forward pass.

    The times below were measured on an H200 at B = 32, L = 680
    (kernels/bench/results/h200-sweep.json). The backward pass takes 0.081 ms at C = 1024 with 2
    warps; at C = 1920 it takes 0.141 ms with 4 warps and 0.179 ms with 8. The forward pass without
    a gate takes 0.031 and 0.056 ms at the two widths, and 0.036 and 0.063 ms with one program per
    row. With a gate, one program per row is the faster form: 0.050 and 0.089 ms, against 0.053 and
    0.098 ms.
    """
    block = 1 << max(5, (C - 1).bit_length())
    warps = min(16, max(1, block // 512))

    def rows(loads: int, most: int) -> Rows:
        stages = next((s for s in (STAGES, 2) if loads * (s - 1) * block * itemsize <= ROOM), 1)
        return Rows(warps, stages, max(1, most // warps))

    return AdaLNConfig(block, rows(1, 16), Rows(warps, 1, A_ROW_EACH), rows(4, 8))


def splits(B: int, L: int, programs: int) -> int:
    """Return the number of programs per sample, for `programs` over the whole batch.

    It is never larger than the number of rows.
    """
    return max(1, min(L, -(-programs // B)))
