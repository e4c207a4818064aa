"""Launch parameters of the cross-entropy kernel, each with the reason for its value."""

from __future__ import annotations

MAX_V = 16384
"""The largest vocabulary. One program holds a row of logits: 16384 float32 numbers take 16
registers per thread with 32 warps."""

MOST_LOGITS = 1 << 26
"""Logits in memory at a time where no gradient is needed: 256 MiB in float32. Products of this size
run at the full rate: at V = 4096 they have 16,384 rows."""

SCALE_BLOCK = 2048
"""Channels of a row that a program of 4 warps multiplies, which is 16 per thread."""


def warps_for(block_v: int) -> int:
    """Return the number of warps that gives 16 logits per thread.

    V = 4096 takes 8 warps and 74 registers per thread on sm_90, so that three programs share a
    multiprocessor. On an H200 at 21,760 rows, 8 warps take 0.120 ms, 4 warps 0.140 ms and 16 warps
    0.154 ms.
    """
    return min(32, max(1, block_v // 512))
