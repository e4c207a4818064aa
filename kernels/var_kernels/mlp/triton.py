"""GELU between the two matrix products of the MLP.

Forward reads h and writes a. Backward reads da and h and writes dh, a (so that a need not be kept from the forward pass) and column sums
of dh, the gradient of the first bias; their partial sums are added in a fixed order outside, so two runs agree bit for bit.

gelu(h) = h sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3): the tanh form with one exponential, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

A = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
B = tl.constexpr(0.044715)
# they stand on the right of a product: the interpreter does not know `constexpr * tensor`


@triton.jit
def sigmoid(u):
    """1 / (1 + e^-u)."""
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def gelu(h, a, count, BLOCK: tl.constexpr):
    """a = gelu(h), elementwise over `count` numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    v = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(a + place, (v * sigmoid((v + v * v * v * B) * A)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    da, h, dh, a, partial, rows, group, hidden, WRITE_A: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # (rows, hidden) each; partial (groups, hidden) float32
    """Program (c, g): BLOCK columns of `group` rows."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < hidden
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * group
    start = first.to(tl.int64) * hidden
    for row in tl.range(0, tl.minimum(group, rows - first), num_stages=STAGES):
        place = start + row * hidden + cols
        v = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(da + place, mask=inside, other=0.0).to(tl.float32)
        s = sigmoid((v + v * v * v * B) * A)
        d = g * (s + v * s * (1.0 - s) * (1.0 + v * v * 3.0 * B) * A)
        total += d
        tl.store(dh + place, d.to(dh.dtype.element_ty), mask=inside)
        if WRITE_A:
            tl.store(a + place, (v * s).to(a.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(1).to(tl.int64) * hidden + cols, total, mask=inside)
