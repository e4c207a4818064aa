"""Kernels of the gated residual and AdaLN.

They process one row of C channels at a time in float32 registers.

The forward pass reads x, y and writes x', h. In bf16 it moves 8 bytes per channel, which is the
floor. The backward pass reads dh, x', dx', y and writes dx, dy, which is 12 bytes. Each program
stays within one sample and keeps the sums over L for the conditions in registers. `finish` adds
these partial sums in a fixed order, so that two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def condition(place, cols, inside):
    """Load a condition of a sample as float32."""
    return tl.load(place + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gate_of(gamma, keep, cols, inside, KEEP: tl.constexpr):
    """Load gamma and multiply it by the factor of a sample whose branch may be dropped."""
    gate = condition(gamma, cols, inside)
    if KEEP:
        gate *= tl.load(keep).to(tl.float32)
    return gate


@triton.jit
def forward(
    x,
    y,
    gamma,
    keep,
    scale,
    shift,
    x_new,
    h,
    mean,
    rstd,
    L,
    C,
    rows,
    gamma_b,
    scale_b,
    shift_b,
    eps,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    A_ROW_EACH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute x' = x + keep gamma y, then h = LN(x') (1 + scale) + shift.

    Program (s, b) handles the rows [s rows, (s + 1) rows) of sample b. The conditions stay in
    registers. With one row per program they are read where they are needed, which leaves room for
    more programs.

    x, y, x_new and h are (B, L, C). gamma, scale and shift are (B, C), with rows that are gamma_b,
    scale_b and shift_b elements apart. keep is (B,), and mean and rstd are (B L,).
    """
    split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    # The divisions and roots below are exact: `/` and sqrt of float32 are approximate on GPUs.
    channels = tl.cast(C, tl.float32)
    if not A_ROW_EACH:
        factor, offset = (
            condition(scale + sample * scale_b, cols, inside) + 1.0,
            condition(shift + sample * shift_b, cols, inside),
        )
        if GATED:
            gate = gate_of(
                gamma + sample * gamma_b, keep + sample if KEEP else keep, cols, inside, KEEP
            )
    for r in tl.range(split * rows, tl.minimum((split + 1) * rows, L), num_stages=STAGES):
        row = sample * L + r
        v = tl.load(x + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            if A_ROW_EACH:
                gate = gate_of(
                    gamma + sample * gamma_b, keep + sample if KEEP else keep, cols, inside, KEEP
                )
            rounded = (
                v + gate * tl.load(y + row * C + cols, mask=inside, other=0.0).to(tl.float32)
            ).to(x_new.dtype.element_ty)
            tl.store(x_new + row * C + cols, rounded, mask=inside)
            # The norm is computed from the rounded values that the next layer reads.
            v = rounded.to(tl.float32)
        centre = tl.div_rn(tl.sum(v, axis=0), channels)
        centred = tl.where(inside, v - centre, 0.0)
        inverse = tl.div_rn(
            1.0, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=0), channels) + eps)
        )
        if A_ROW_EACH:
            factor, offset = (
                condition(scale + sample * scale_b, cols, inside) + 1.0,
                condition(shift + sample * shift_b, cols, inside),
            )
        tl.store(
            h + row * C + cols,
            (centred * inverse * factor + offset).to(h.dtype.element_ty),
            mask=inside,
        )
        tl.store(mean + row, centre)
        tl.store(rstd + row, inverse)


@triton.jit
def backward(
    dh,
    dx_new,
    x_new,
    y,
    gamma,
    keep,
    scale,
    mean,
    rstd,
    dx,
    dy,
    partial,
    L,
    C,
    rows,
    gamma_b,
    scale_b,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dx, dy and the partial sums for the conditions.

    Program (s, b) handles the rows [s rows, (s + 1) rows) of sample b. The gate and the scale stay
    in registers. partial is (B, splits, 3, C) float32 and holds the sums for scale, shift and
    gamma.
    """
    split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    factor = 1.0 + condition(scale + sample * scale_b, cols, inside)
    channels = tl.cast(C, tl.float32)
    survive = 1.0
    if GATED:
        if KEEP:
            survive = tl.load(keep + sample).to(tl.float32)
        gate = condition(gamma + sample * gamma_b, cols, inside) * survive
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    sum_shift = tl.zeros([BLOCK_C], tl.float32)
    sum_gamma = tl.zeros([BLOCK_C], tl.float32)
    for r in tl.range(split * rows, tl.minimum((split + 1) * rows, L), num_stages=STAGES):
        row = sample * L + r
        g = tl.load(dh + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x_new + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normal = tl.where(inside, (v - tl.load(mean + row)) * inverse, 0.0)
        sum_scale += g * normal
        sum_shift += g
        g *= factor
        along, across = (
            tl.div_rn(tl.sum(g * normal, axis=0), channels),
            tl.div_rn(tl.sum(g, axis=0), channels),
        )
        d = (g - across - normal * along) * inverse
        if RESIDUAL:
            d += tl.load(dx_new + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            sum_gamma += d * tl.load(y + row * C + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(dy + row * C + cols, (d * gate).to(dy.dtype.element_ty), mask=inside)
        tl.store(dx + row * C + cols, d.to(dx.dtype.element_ty), mask=inside)
    out = partial + (sample * tl.num_programs(0) + split) * 3 * C + cols
    tl.store(out, sum_scale, mask=inside)
    tl.store(out + C, sum_shift, mask=inside)
    if GATED:
        tl.store(out + 2 * C, sum_gamma * survive, mask=inside)


@triton.jit
def finish(partial, dscale, dshift, dgamma, C, splits, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """Add the partial sums of a sample in order.

    Program (c, b) handles BLOCK channels of the three conditions.
    """
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_shift = tl.zeros([BLOCK], tl.float32)
    sum_gamma = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        place = partial + (sample * splits + split) * 3 * C + cols
        sum_scale += tl.load(place, mask=inside, other=0.0)
        sum_shift += tl.load(place + C, mask=inside, other=0.0)
        if GATED:
            sum_gamma += tl.load(place + 2 * C, mask=inside, other=0.0)
    tl.store(dscale + sample * C + cols, sum_scale.to(dscale.dtype.element_ty), mask=inside)
    tl.store(dshift + sample * C + cols, sum_shift.to(dshift.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(dgamma + sample * C + cols, sum_gamma.to(dgamma.dtype.element_ty), mask=inside)
