"""One pass over a row of logits: log-sum-exp, loss, arg-max, and the gradient in their place. 4 bytes a logit in bf16, the floor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy(logits, target, loss, ce, best, V, row_stride, smoothing, z_loss, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Program n: with GRADIENT row n of `logits` becomes d loss_n / d logits = softmax (1 + 2 z lse) - (1 - s) onehot - s / V, else it
    stays."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    inside = cols < V
    z = tl.load(logits + row * row_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    wanted = tl.load(target + row)
    largest = tl.max(z, axis=0)
    e = tl.exp(z - largest)
    total = tl.sum(e, axis=0)
    lse = largest + tl.log(total)
    at_target = tl.sum(tl.where(cols == wanted, z, 0.0), axis=0)  # not a second load: other warps may have written the row by then
    at_target = tl.where((wanted >= 0) & (wanted < V), at_target, float("nan"))
    mean = tl.sum(tl.where(inside, z, 0.0), axis=0) / V
    tl.store(ce + row, lse - at_target)
    tl.store(loss + row, (1.0 - smoothing) * (lse - at_target) + smoothing * (lse - mean) + z_loss * lse * lse)
    tl.store(best + row, tl.argmax(z, axis=0).to(tl.int64))
    if GRADIENT:
        gradient = e * ((1.0 + 2.0 * z_loss * lse) / total) - smoothing / V
        gradient = tl.where(cols == wanted, gradient - (1.0 - smoothing), gradient)
        tl.store(logits + row * row_stride + cols, gradient.to(logits.dtype.element_ty), mask=inside)
