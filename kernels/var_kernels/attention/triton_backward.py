"""The backward pass of block-causal attention, in two kernels: the first owns a tile of queries (dq
and delta), the second a tile of keys (dk and dv). Each sums in its own registers: no atomics, so
two runs agree bit for bit."""

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


@triton.jit
def queries_step(
    acc,
    q,
    do,
    factor,
    row_lse,
    row_delta,
    lo,
    hi,
    start,
    last,
    k_head,
    v_head,
    inv_k,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys, added to dq (before the norm) of a tile of queries."""
    keys = start + tl.arange(0, BLOCK_N)
    valid = keys < last
    k, v = (
        tile(k_head, keys, valid, D, BLOCK_D, not MASKED),
        tile(v_head, keys, valid, D, BLOCK_D, not MASKED),
    )
    s = dot(q, tl.trans(k), UPCAST, PRECISION)
    norms = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORM:
        norms = tl.load(inv_k + keys, mask=valid, other=0.0) if MASKED else tl.load(inv_k + keys)
        s *= norms[None, :]
    p = tl.exp2(s * (factor * LOG2E)[:, None] - row_lse[:, None])
    if MASKED:
        p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), p, 0.0)
    ds = p * (dot(do, tl.trans(v), UPCAST, PRECISION) - row_delta[:, None])
    if NORM and k.dtype == tl.float16:
        return acc + dot(
            ds.to(k.dtype), (k.to(tl.float32) * norms[:, None]).to(k.dtype), UPCAST, PRECISION
        )
    return acc + dot((ds * norms[None, :]).to(k.dtype), k, UPCAST, PRECISION)


@triton.jit
def backward_queries(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    inv_q,
    inv_k,
    log_scale,
    dq,
    dscale,
    tiles,
    row_lo,
    row_hi,
    sm_scale,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    do_strides,
    dq_strides,
    count,
    H,
    Lq,
    Lk,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq of a tile of queries, delta (B, H, L) = sum over D of o do, which `backward_keys` reads,
    and each query's part of the gradient of its head's scale, dscale (B, H, L). The sum of these
    parts is computed outside: Triton 3.7 cannot compile it here for Blackwell (a sum to one number
    of a sum over a tile in tensor memory)."""
    b, h, bh, start, stop, kv_lo, kv_hi, full_lo, full_hi = tile_of(tiles, count, H)
    rows = start + tl.arange(0, BLOCK_M)
    mine = rows < stop
    lo, hi = tl.load(row_lo + rows, mask=mine, other=0), tl.load(row_hi + rows, mask=mine, other=0)
    q_tile = tile(matrix(q, q_strides, b, h), rows, mine, D, BLOCK_D)
    do_tile = tile(matrix(do, do_strides, b, h), rows, mine, D, BLOCK_D)
    o_tile = tile(matrix(o, o_strides, b, h), rows, mine, D, BLOCK_D).to(tl.float32)
    row_delta = tl.sum(o_tile * do_tile.to(tl.float32), axis=1)
    tl.store(delta + bh * Lq + rows, row_delta, mask=mine)
    row_lse = tl.load(lse + bh * Lq + rows, mask=mine, other=0.0)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * head_factor(log_scale, h, sm_scale, NORM)
    inverse = factor
    if NORM:
        inverse = tl.load(inv_q + bh * Lq + rows, mask=mine, other=0.0)
        factor *= inverse
    k_head, v_head = matrix(k, k_strides, b, h), matrix(v, v_strides, b, h)
    norms = inv_k + bh * Lk
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head, middle, whole, tail = parts(kv_lo, kv_hi, full_lo, full_hi, BLOCK_N)
    for i in tl.range(0, whole, num_stages=STAGES):
        acc = queries_step(
            acc,
            q_tile,
            do_tile,
            factor,
            row_lse,
            row_delta,
            lo,
            hi,
            middle + i * BLOCK_N,
            kv_hi,
            k_head,
            v_head,
            norms,
            False,
            NORM,
            D,
            BLOCK_N,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    for i in tl.range(0, head + tail):
        n = tl.where(i < head, kv_lo + i * BLOCK_N, middle + (whole + i - head) * BLOCK_N)
        acc = queries_step(
            acc,
            q_tile,
            do_tile,
            factor,
            row_lse,
            row_delta,
            lo,
            hi,
            n,
            kv_hi,
            k_head,
            v_head,
            norms,
            True,
            NORM,
            D,
            BLOCK_N,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    if NORM:
        normal = q_tile.to(tl.float32) * inverse[:, None]
        along = tl.sum(normal * acc, axis=1)
        tl.store(
            dscale + bh * Lq + rows, along * head_factor(log_scale, h, sm_scale, NORM), mask=mine
        )
        acc -= normal * tl.where(inverse < 1.0 / NORM_EPS, along, 0.0)[:, None]
    put(matrix(dq, dq_strides, b, h), rows, mine, acc * factor[:, None], D, BLOCK_D)


@triton.jit
def keys_step(
    dk,
    dv,
    k,
    v,
    k_factor,
    scale,
    lo,
    hi,
    start,
    last,
    q_head,
    do_head,
    lse,
    delta,
    inv_q,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries, added to dk (before the norm) and dv of a tile of keys.

    Queries run down the rows of s: a thread of a tensor-core tile holds two rows and a quarter of
    the columns, so that it loads two values of lse, delta and inv_q each, not sixteen."""
    rows = start + tl.arange(0, BLOCK_M)
    valid = rows < last
    q, do = tile(q_head, rows, valid, D, BLOCK_D), tile(do_head, rows, valid, D, BLOCK_D)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if NORM:
        factor *= tl.load(inv_q + rows, mask=valid, other=0.0)
    s = dot(q, tl.trans(k), UPCAST, PRECISION) * (k_factor * LOG2E)[None, :]
    p = tl.exp2(s * factor[:, None] - tl.load(lse + rows, mask=valid, other=float("inf"))[:, None])
    if MASKED:
        p = tl.where((rows[:, None] >= lo[None, :]) & (rows[:, None] < hi[None, :]), p, 0.0)
    dv += dot(tl.trans(p.to(do.dtype)), do, UPCAST, PRECISION)
    ds = p * (
        dot(do, tl.trans(v), UPCAST, PRECISION)
        - tl.load(delta + rows, mask=valid, other=0.0)[:, None]
    )
    if q.dtype == tl.float16:  # 1/|q| may be beyond float16; q/|q| is not
        unit = q.to(tl.float32) * (factor / scale)[:, None]
        dk += dot(tl.trans(ds.to(q.dtype)), unit.to(q.dtype), UPCAST, PRECISION) * scale
    else:
        dk += dot(tl.trans((ds * factor[:, None]).to(q.dtype)), q, UPCAST, PRECISION)
    return dk, dv


@triton.jit
def backward_keys(
    q,
    k,
    v,
    do,
    lse,
    delta,
    inv_q,
    inv_k,
    log_scale,
    dk,
    dv,
    tiles,
    key_lo,
    key_hi,
    sm_scale,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
    count,
    H,
    Lq,
    Lk,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of a tile of keys, from all queries that see any of them; `tiles` is transposed."""
    b, h, bh, start, stop, first, last, full_lo, full_hi = tile_of(tiles, count, H)
    keys = start + tl.arange(0, BLOCK_N)
    mine = keys < stop
    lo, hi = tl.load(key_lo + keys, mask=mine, other=0), tl.load(key_hi + keys, mask=mine, other=0)
    k_tile = tile(matrix(k, k_strides, b, h), keys, mine, D, BLOCK_D)
    v_tile = tile(matrix(v, v_strides, b, h), keys, mine, D, BLOCK_D)
    scale = head_factor(log_scale, h, sm_scale, NORM)
    k_factor = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORM:
        k_factor = tl.load(inv_k + bh * Lk + keys, mask=mine, other=0.0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_head, do_head = matrix(q, q_strides, b, h), matrix(do, do_strides, b, h)
    lse_base, delta_base, inv_base = lse + bh * Lq, delta + bh * Lq, inv_q + bh * Lq
    head, middle, whole, tail = parts(first, last, full_lo, full_hi, BLOCK_M)
    if (
        full_hi == last
    ):  # rows past the end are zeros, with a weight of 0: the last block needs no mask either
        whole, tail = whole + tail, 0
    for i in tl.range(0, whole, num_stages=STAGES):
        dk_acc, dv_acc = keys_step(
            dk_acc,
            dv_acc,
            k_tile,
            v_tile,
            k_factor,
            scale,
            lo,
            hi,
            middle + i * BLOCK_M,
            last,
            q_head,
            do_head,
            lse_base,
            delta_base,
            inv_base,
            False,
            NORM,
            D,
            BLOCK_M,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    for i in tl.range(0, head + tail):
        row = tl.where(i < head, first + i * BLOCK_M, middle + (whole + i - head) * BLOCK_M)
        dk_acc, dv_acc = keys_step(
            dk_acc,
            dv_acc,
            k_tile,
            v_tile,
            k_factor,
            scale,
            lo,
            hi,
            row,
            last,
            q_head,
            do_head,
            lse_base,
            delta_base,
            inv_base,
            True,
            NORM,
            D,
            BLOCK_M,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
    if NORM:  # through k / |k|: the part along k is lost
        normal = k_tile.to(tl.float32) * k_factor[:, None]
        along = tl.where(k_factor < 1.0 / NORM_EPS, tl.sum(normal * dk_acc, axis=1), 0.0)
        dk_acc = (dk_acc - normal * along[:, None]) * k_factor[:, None]
    put(matrix(dk, dk_strides, b, h), keys, mine, dk_acc, D, BLOCK_D)
    put(matrix(dv, dv_strides, b, h), keys, mine, dv_acc, D, BLOCK_D)
