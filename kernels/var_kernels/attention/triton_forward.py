"""The forward pass of block-causal attention: softmax over the keys of a tile's scales, block after
block, without an L x L mask.

Tiles end where scales end (schedule.py), so that all rows of a tile see the same keys. Only the
last, partly filled block is masked, in a loop of its own: masks on the loads of the main loop take
15 to 25 % of the forward pass on an H200. The L2 norm of q and k is not applied to the tiles: q k^T
of the raw ones is multiplied by 1/|q|, 1/|k| and the head's scale in float32. That saves one
rounding, and k goes straight from shared memory into the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from var_kernels.attention.triton_tiles import (
    LOG2E,
    NORM_EPS,
    dot,
    head_factor,
    matrix,
    parts,
    put,
    tile,
    tile_of,
)

MOST = tl.constexpr(40.0)
"""largest scale of a head for which exp(s - scale), with s from -scale to scale, keeps all its
digits in float32 and bfloat16: e^-80"""


@triton.jit
def attend(
    acc,
    top,
    total,
    q,
    factor,
    lo,
    hi,
    n,
    kv_hi,
    k_head,
    v_head,
    inv_k,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys of the softmax. `factor` (rows,) is the scale of q in units of log2.
    BOUNDED: `top` is an upper bound of all logits and stays."""
    keys = n + tl.arange(0, BLOCK_N)
    valid = keys < kv_hi
    k = tile(k_head, keys, valid, D, BLOCK_D, not MASKED)
    s = dot(q, tl.trans(k), UPCAST, PRECISION)
    if NORM:
        s *= (tl.load(inv_k + keys, mask=valid, other=0.0) if MASKED else tl.load(inv_k + keys))[
            None, :
        ]
    if MASKED:
        s = tl.where(
            (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf")
        )
    new = top
    if not BOUNDED:
        new = tl.maximum(top, tl.max(s, axis=1) * factor)
    safe = (
        tl.where(new == float("-inf"), 0.0, new) if MASKED and not BOUNDED else new
    )  # a row that has not met a key of its own yet
    p = tl.exp2(s * factor[:, None] - safe[:, None])
    if not BOUNDED:
        fade = tl.exp2(top - safe)
        acc, total = acc * fade[:, None], total * fade
    v = tile(v_head, keys, valid, D, BLOCK_D, not MASKED)
    return acc + dot(p.to(v.dtype), v, UPCAST, PRECISION), new, total + tl.sum(p, axis=1)


@triton.jit
def sweep(
    acc,
    top,
    total,
    q,
    factor,
    lo,
    hi,
    kv_lo,
    kv_hi,
    full_lo,
    full_hi,
    k_head,
    v_head,
    inv_k,
    BOUNDED: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All keys of a tile of queries: the blocks that all rows see, then those that only some rows
    see and a last block that is not full."""
    head, middle, whole, tail = parts(kv_lo, kv_hi, full_lo, full_hi, BLOCK_N)
    for i in tl.range(0, whole, num_stages=STAGES):
        acc, top, total = attend(
            acc,
            top,
            total,
            q,
            factor,
            lo,
            hi,
            middle + i * BLOCK_N,
            kv_hi,
            k_head,
            v_head,
            inv_k,
            False,
            BOUNDED,
            NORM,
            D,
            BLOCK_N,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    for i in tl.range(0, head + tail):
        n = tl.where(i < head, kv_lo + i * BLOCK_N, middle + (whole + i - head) * BLOCK_N)
        acc, top, total = attend(
            acc,
            top,
            total,
            q,
            factor,
            lo,
            hi,
            n,
            kv_hi,
            k_head,
            v_head,
            inv_k,
            True,
            BOUNDED,
            NORM,
            D,
            BLOCK_N,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    return acc, top, total


@triton.jit
def highest(
    q,
    factor,
    lo,
    hi,
    kv_lo,
    kv_hi,
    k_head,
    inv_k,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest logit of each row, in a pass of its own."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for n in tl.range(kv_lo, kv_hi, BLOCK_N, num_stages=1):
        keys = n + tl.arange(0, BLOCK_N)
        valid = keys < kv_hi
        s = dot(q, tl.trans(tile(k_head, keys, valid, D, BLOCK_D)), UPCAST, PRECISION)
        s *= tl.load(inv_k + keys, mask=valid, other=0.0)[None, :]
        s = tl.where(
            (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf")
        )
        top = tl.maximum(top, tl.max(s, axis=1) * factor)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def forward(
    q,
    k,
    v,
    o,
    lse,
    inv_q,
    inv_k,
    log_scale,
    tiles,
    row_lo,
    row_hi,
    sm_scale,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    count,
    H,
    Lq,
    Lk,
    NORM: tl.constexpr,
    BOUND: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries of a head: o (B, L, H, D), lse (B, H, L) in units of log2, and 1/|q|."""
    b, h, bh, start, stop, kv_lo, kv_hi, full_lo, full_hi = tile_of(tiles, count, H)
    rows = start + tl.arange(0, BLOCK_M)
    mine = rows < stop
    lo, hi = tl.load(row_lo + rows, mask=mine, other=0), tl.load(row_hi + rows, mask=mine, other=0)
    q_tile = tile(matrix(q, q_strides, b, h), rows, mine, D, BLOCK_D)
    scale = head_factor(log_scale, h, sm_scale, NORM)
    factor = tl.full([BLOCK_M], LOG2E, tl.float32) * scale
    if NORM:
        wide = q_tile.to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), NORM_EPS)
        tl.store(inv_q + bh * Lq + rows, inverse, mask=mine)
        factor *= inverse
    k_head, v_head, norms = matrix(k, k_strides, b, h), matrix(v, v_strides, b, h), inv_k + bh * Lk
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # |q/|q| k/|k|| <= 1: if the head's scale is not too large, it can take the place of the
    # maximum.
    if BOUND:
        top = tl.full([BLOCK_M], LOG2E, tl.float32) * scale
        if scale >= MOST:
            top = highest(
                q_tile,
                factor,
                lo,
                hi,
                kv_lo,
                kv_hi,
                k_head,
                norms,
                D,
                BLOCK_N,
                BLOCK_D,
                UPCAST,
                PRECISION,
            )
    acc, top, total = sweep(
        acc,
        top,
        total,
        q_tile,
        factor,
        lo,
        hi,
        kv_lo,
        kv_hi,
        full_lo,
        full_hi,
        k_head,
        v_head,
        norms,
        BOUND,
        NORM,
        D,
        BLOCK_N,
        BLOCK_D,
        UPCAST,
        PRECISION,
        STAGES,
    )
    put(matrix(o, o_strides, b, h), rows, mine, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + bh * Lq + rows, top + tl.log2(total), mask=mine)
