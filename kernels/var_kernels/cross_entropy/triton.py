"""The cross-entropy in one pass over each row of logits.

The pass computes the log-sum-exp, the loss and the arg-max, and it overwrites the logits with their
gradient. It moves 4 bytes per logit in bf16, which is the floor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy(
    logits,
    target,
    loss,
    ce,
    best,
    V,
    row_stride,
    smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program n computes the loss, the cross-entropy and the most likely code of row n.

    With GRADIENT, row n of `logits` becomes
    d loss_n / d logits = softmax (1 + 2 z lse) - (1 - s) onehot - s / V; otherwise the row is
    unchanged. SMOOTH states that s is not 0.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    inside = cols < V
    wanted = tl.load(target + row)
    known = (wanted >= 0) & (wanted < V)
    at_target = tl.load(logits + row * row_stride + wanted, mask=known, other=float("nan")).to(
        tl.float32
    )
    z = tl.load(logits + row * row_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    # After this reduction every warp has read its part, so that the row may be overwritten.
    largest, where = tl.max(z, axis=0, return_indices=True)
    e = tl.exp(z - largest)
    total = tl.sum(e, axis=0)
    lse = largest + tl.log(total)
    value = lse - at_target
    tl.store(ce + row, value)
    if SMOOTH:
        mean = tl.sum(tl.where(inside, z, 0.0), axis=0) / V
        value = (1.0 - smoothing) * value + smoothing * (lse - mean)
    tl.store(loss + row, value + z_loss * lse * lse)
    tl.store(best + row, where.to(tl.int64))
    if GRADIENT:
        gradient = e * ((1.0 + 2.0 * z_loss * lse) / total)
        if SMOOTH:
            gradient -= smoothing / V
        gradient = tl.where(cols == wanted, gradient - (1.0 - smoothing), gradient)
        tl.store(
            logits + row * row_stride + cols, gradient.to(logits.dtype.element_ty), mask=inside
        )


@triton.jit
def scale_rows(x, factor, out, C, x_stride, BLOCK_C: tl.constexpr):
    """Write one row of out (N, C) = x (N, C) factor (N,); `out` may be x."""
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    v = tl.load(x + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32) * tl.load(
        factor + row
    ).to(tl.float32)
    tl.store(out + row * C + cols, v.to(out.dtype.element_ty), mask=cols < C)
