"""The nearest code, which has the smallest |c|^2 - 2 z c over all codes.

The minimum stays in registers while the kernel reads the codes, and no (N, V) matrix is written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_code(
    z,
    codes,
    squares,
    index,
    N,
    V,
    Z,
    z_stride,
    code_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program handles BLOCK_N vectors.

    The codes are read in ascending order, and only a strictly smaller distance replaces the
    minimum, so that the lowest index is found.
    """
    rows, channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Z)
    inside = (rows[:, None] < N) & (channels[None, :] < Z)
    vectors = tl.load(
        z + rows[:, None].to(tl.int64) * z_stride + channels[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    found = tl.zeros([BLOCK_N], tl.int32)
    for start in tl.range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        place = codes + cols[:, None] * code_stride + channels[None, :]
        code = tl.load(place, mask=(cols[:, None] < V) & (channels[None, :] < Z), other=0.0).to(
            tl.float32
        )
        square = tl.load(squares + cols, mask=cols < V, other=float("inf"))
        distance = square[None, :] - 2.0 * tl.dot(
            vectors, tl.trans(code), input_precision=PRECISION
        )
        smallest = tl.min(distance, axis=1)
        where = tl.argmin(distance, axis=1).to(tl.int32) + start
        found = tl.where(smallest < best, where, found)
        best = tl.minimum(best, smallest)
    tl.store(index + rows, found.to(tl.int64), mask=rows < N)
