"""GELU between the two matrix products of the MLP.

The products are the vendor's. Products of our own in Triton, with the GELU inside, took 1.27 to
1.35 times as long on an H200 (kernels/bench/results/h200-sweep.json) and were removed.

The forward pass reads h and writes a. The backward pass reads da and h. It writes dh, a (so that
the forward pass does not have to keep a) and the column sums of dh, which are the gradient of the
first bias. The partial sums are added outside of the kernel in a fixed order, so that two runs
agree bit for bit.

gelu(h) = h sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3). This is the tanh form with one
exponential, and it is computed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Use these constants on the right of a product: the interpreter does not support
# `constexpr * tensor`. A is 2 sqrt(2 / pi).
A = tl.constexpr(1.5957691216057308)
B = tl.constexpr(0.044715)


@triton.jit
def share(v):
    """Return sigmoid(2 u), the part of v that the GELU lets through."""
    return 1.0 / (1.0 + tl.exp(-((v + v * v * v * B) * A)))


@triton.jit
def slope(v, s):
    """Return the derivative of the GELU at v, whose share is s."""
    return s + v * s * (1.0 - s) * (1.0 + v * v * 3.0 * B) * A


@triton.jit
def gelu(h, a, count, BLOCK: tl.constexpr):
    """Write a = gelu(h), elementwise over `count` numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    v = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(a + place, (v * share(v)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    da,
    h,
    dh,
    a,
    partial,
    rows,
    group,
    hidden,
    WRITE_A: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write dh, the column sums of dh, and with WRITE_A also a.

    da, h, dh and a are (rows, hidden), and partial is (groups, hidden) float32. Program (c, g)
    handles BLOCK columns of `group` rows.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < hidden
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * group
    start = first.to(tl.int64) * hidden
    for row in tl.range(0, tl.minimum(group, rows - first), num_stages=STAGES):
        place = start + row * hidden + cols
        v = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(da + place, mask=inside, other=0.0).to(tl.float32)
        s = share(v)
        d = g * slope(v, s)
        total += d
        tl.store(dh + place, d.to(dh.dtype.element_ty), mask=inside)
        if WRITE_A:
            tl.store(a + place, (v * s).to(a.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(1).to(tl.int64) * hidden + cols, total, mask=inside)
