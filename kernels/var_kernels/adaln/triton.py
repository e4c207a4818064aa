"""Kernels of the gated residual and AdaLN: one row of C channels at a time, in float32 registers.

Forward reads x, y and writes x', h: 8 bytes a channel in bf16, the floor. Backward reads dh, x', dx', y and writes dx, dy: 12. The sums
over L for the conditions are taken by programs that never leave a sample, in registers; their partial sums are added in a fixed order by
`finish`, so two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def condition(place, cols, inside):
    """A condition of a sample, float32."""
    return tl.load(place + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gate_of(gamma, keep, cols, inside, KEEP: tl.constexpr):
    """gamma, by the factor of a sample whose branch may be dropped."""
    gate = condition(gamma, cols, inside)
    if KEEP:
        gate *= tl.load(keep).to(tl.float32)
    return gate


@triton.jit
def forward(
    x, y, gamma, keep, scale, shift,  # (B, L, C), (B, L, C), (B, C) rows gamma_b apart, (B,), (B, C), (B, C)
    x_new, h, mean, rstd,  # (B, L, C), (B, L, C), (B L,), (B L,)
    L, C, rows, gamma_b, scale_b, shift_b, eps,
    GATED: tl.constexpr, KEEP: tl.constexpr, A_ROW_EACH: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (s, b) takes rows [s rows, (s + 1) rows) of sample b: x' = x + keep gamma y, then h = LN(x') (1 + scale) + shift. The
    conditions stay in registers, or with one row each are read where they are needed, which leaves room for more programs."""
    split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    channels = tl.cast(C, tl.float32)  # exact divisions: `/` and sqrt of float32 are approximate on GPUs
    if not A_ROW_EACH:
        factor, offset = condition(scale + sample * scale_b, cols, inside) + 1.0, condition(shift + sample * shift_b, cols, inside)
        if GATED:
            gate = gate_of(gamma + sample * gamma_b, keep + sample if KEEP else keep, cols, inside, KEEP)
    for r in tl.range(split * rows, tl.minimum((split + 1) * rows, L), num_stages=STAGES):
        row = sample * L + r
        v = tl.load(x + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            if A_ROW_EACH:
                gate = gate_of(gamma + sample * gamma_b, keep + sample if KEEP else keep, cols, inside, KEEP)
            rounded = (v + gate * tl.load(y + row * C + cols, mask=inside, other=0.0).to(tl.float32)).to(x_new.dtype.element_ty)
            tl.store(x_new + row * C + cols, rounded, mask=inside)
            v = rounded.to(tl.float32)  # the norm is of what the next layer will read
        centre = tl.div_rn(tl.sum(v, axis=0), channels)
        centred = tl.where(inside, v - centre, 0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=0), channels) + eps))
        if A_ROW_EACH:
            factor, offset = condition(scale + sample * scale_b, cols, inside) + 1.0, condition(shift + sample * shift_b, cols, inside)
        tl.store(h + row * C + cols, (centred * inverse * factor + offset).to(h.dtype.element_ty), mask=inside)
        tl.store(mean + row, centre)
        tl.store(rstd + row, inverse)


@triton.jit
def backward(
    dh, dx_new, x_new, y, gamma, keep, scale, mean, rstd,
    dx, dy, partial,  # partial (B, splits, 3, C) float32: sums for scale, shift, gamma
    L, C, rows, gamma_b, scale_b,
    GATED: tl.constexpr, KEEP: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (s, b) takes rows [s rows, (s + 1) rows) of sample b; gate and scale stay in registers."""
    split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    factor = 1.0 + tl.load(scale + sample * scale_b + cols, mask=inside, other=0.0).to(tl.float32)
    channels = tl.cast(C, tl.float32)
    survive = 1.0
    if GATED:
        if KEEP:
            survive = tl.load(keep + sample).to(tl.float32)
        gate = tl.load(gamma + sample * gamma_b + cols, mask=inside, other=0.0).to(tl.float32) * survive
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
        along, across = tl.div_rn(tl.sum(g * normal, axis=0), channels), tl.div_rn(tl.sum(g, axis=0), channels)
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
    """Add the partial sums of a sample in order: program (c, b) takes BLOCK channels of the three conditions."""
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
