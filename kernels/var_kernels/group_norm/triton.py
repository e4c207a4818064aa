"""Group norm and SiLU of channels-last maps, the memory format for convolutions on tensor cores.

The kernels read a map twice and write it once. They sum each channel separately, as differences
from the first pixel, so that a large mean does not cost precision. The statistics of a group follow
from those of its channels. All sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums(x, partial, rows, C, group, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute the sums of x - x[0] and of its square for each channel.

    Program (s, b) handles the pixels [s group, (s + 1) group) of sample b (rows, C).
    """
    split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    base = x + sample * rows * C
    pivot = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros([R, BLOCK_C], tl.float32)
    second = tl.zeros([R, BLOCK_C], tl.float32)
    end = tl.minimum((split + 1) * group, rows)
    for start in tl.range(split * group, end, R):
        r = start + tl.arange(0, R)
        valid = (r < end)[:, None] & inside[None, :]
        d = (
            tl.load(base + r[:, None].to(tl.int64) * C + cols[None, :], mask=valid, other=0.0).to(
                tl.float32
            )
            - pivot[None, :]
        )
        d = tl.where(valid, d, 0.0)
        first += d
        second += d * d
    out = partial + (sample * tl.num_programs(0) + split) * 2 * C + cols
    tl.store(out, tl.sum(first, axis=0), mask=inside)
    tl.store(out + C, tl.sum(second, axis=0), mask=inside)


@triton.jit
def finish(
    x,
    partial,
    weight,
    bias,
    affine,
    rows,
    C,
    splits,
    width,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Compute the factor and the offset of each channel, affine (B, 2, C).

    Program (g, b) handles group g of sample b, which has `width` channels.
    """
    sample = tl.program_id(1).to(tl.int64)
    split, lane = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_W)
    cols = tl.program_id(0) * width + lane
    mine = lane < width
    place = partial + (sample * splits + split[:, None]) * 2 * C + cols[None, :]
    there = (split < splits)[:, None] & mine[None, :]
    first = tl.sum(tl.load(place, mask=there, other=0.0), axis=0)
    second = tl.sum(tl.load(place + C, mask=there, other=0.0), axis=0)
    count = tl.cast(rows, tl.float32)
    size = tl.cast(width, tl.float32)
    centre = (
        tl.load(x + sample * rows * C + cols, mask=mine, other=0.0).to(tl.float32) + first / count
    )
    mean = tl.sum(tl.where(mine, centre, 0.0), axis=0) / size
    apart = tl.where(mine, centre - mean, 0.0)
    variance = (
        tl.sum(
            tl.where(mine, second / count - (first / count) * (first / count), 0.0) + apart * apart,
            axis=0,
        )
        / size
    )
    factor = tl.load(weight + cols, mask=mine, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    tl.store(affine + sample * 2 * C + cols, factor, mask=mine)
    tl.store(
        affine + sample * 2 * C + C + cols,
        tl.load(bias + cols, mask=mine, other=0.0).to(tl.float32) - mean * factor,
        mask=mine,
    )


@triton.jit
def apply(x, affine, y, rows, C, SILU: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program (s, b) computes y = silu(x factor + offset) for R pixels of sample b."""
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    r = tl.program_id(0) * R + tl.arange(0, R)
    valid = (r < rows)[:, None] & inside[None, :]
    factor = tl.load(affine + sample * 2 * C + cols, mask=inside, other=0.0)
    offset = tl.load(affine + sample * 2 * C + C + cols, mask=inside, other=0.0)
    place = sample * rows * C + r[:, None].to(tl.int64) * C + cols[None, :]
    v = tl.load(x + place, mask=valid, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        v = v / (1.0 + tl.exp(-v))
    tl.store(y + place, v.to(y.dtype.element_ty), mask=valid)
