"""The backward pass of block-causal attention, in two kernels: one owns a tile of keys (dk and dv),
the other a tile of queries (dq). Each sums in its own registers: no atomics, so two runs agree bit
for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from var_kernels.attention.triton_tiles import (
    LOG2E,
    NORM_EPS,
    dot,
    head_factor,
    parts,
    put,
    tile,
    tile_of,
)


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
    q_base,
    do_base,
    q_l,
    do_l,
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
    """One block of queries, added to dk (before the norm) and dv of a tile of keys."""
    rows = start + tl.arange(0, BLOCK_M)
    valid = rows < last
    q, do = tile(q_base, rows, q_l, valid, D, BLOCK_D), tile(do_base, rows, do_l, valid, D, BLOCK_D)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if NORM:
        factor *= tl.load(inv_q + rows, mask=valid, other=0.0)
    s = dot(k, tl.trans(q), UPCAST, PRECISION) * (k_factor * LOG2E)[:, None]
    p = tl.exp2(s * factor[None, :] - tl.load(lse + rows, mask=valid, other=float("inf"))[None, :])
    if MASKED:
        p = tl.where((rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None]), p, 0.0)
    dv += dot(p.to(do.dtype), do, UPCAST, PRECISION)
    ds = p * (
        dot(v, tl.trans(do), UPCAST, PRECISION)
        - tl.load(delta + rows, mask=valid, other=0.0)[None, :]
    )
    if q.dtype == tl.float16:  # 1/|q| may be beyond float16; q/|q| is not
        unit = q.to(tl.float32) * (factor / scale)[:, None]
        dk += dot(ds.to(q.dtype), unit.to(q.dtype), UPCAST, PRECISION) * scale
    else:
        dk += dot((ds * factor[None, :]).to(q.dtype), q, UPCAST, PRECISION)
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
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    do_b,
    do_l,
    do_h,
    dk_b,
    dk_l,
    dk_h,
    dv_b,
    dv_l,
    dv_h,
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
    k_tile = tile(k + b * k_b + h * k_h, keys, k_l, mine, D, BLOCK_D)
    v_tile = tile(v + b * v_b + h * v_h, keys, v_l, mine, D, BLOCK_D)
    scale = head_factor(log_scale, h, sm_scale, NORM)
    k_factor = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORM:
        k_factor = tl.load(inv_k + bh * Lk + keys, mask=mine, other=0.0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_base, do_base = q + b * q_b + h * q_h, do + b * do_b + h * do_h
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
            q_base,
            do_base,
            q_l,
            do_l,
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
            q_base,
            do_base,
            q_l,
            do_l,
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
    put(dk + b * dk_b + h * dk_h, keys, dk_l, mine, dk_acc, D, BLOCK_D)
    put(dv + b * dv_b + h * dv_h, keys, dv_l, mine, dv_acc, D, BLOCK_D)


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
    k_base,
    v_base,
    k_l,
    v_l,
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
        tile(k_base, keys, k_l, valid, D, BLOCK_D, not MASKED),
        tile(v_base, keys, v_l, valid, D, BLOCK_D, not MASKED),
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
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    do_b,
    do_l,
    do_h,
    dq_b,
    dq_l,
    dq_h,
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
    """dq of a tile of queries, and each query's part of the gradient of its head's scale, dscale
    (B, H, L). Their sum is computed outside: Triton 3.7 cannot compile it here for Blackwell (a sum
    to one number of a sum over a tile in tensor memory)."""
    b, h, bh, start, stop, kv_lo, kv_hi, full_lo, full_hi = tile_of(tiles, count, H)
    rows = start + tl.arange(0, BLOCK_M)
    mine = rows < stop
    lo, hi = tl.load(row_lo + rows, mask=mine, other=0), tl.load(row_hi + rows, mask=mine, other=0)
    q_tile = tile(q + b * q_b + h * q_h, rows, q_l, mine, D, BLOCK_D)
    do_tile = tile(do + b * do_b + h * do_h, rows, do_l, mine, D, BLOCK_D)
    row_lse, row_delta = (
        tl.load(lse + bh * Lq + rows, mask=mine, other=0.0),
        tl.load(delta + bh * Lq + rows, mask=mine, other=0.0),
    )
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * head_factor(log_scale, h, sm_scale, NORM)
    inverse = factor
    if NORM:
        inverse = tl.load(inv_q + bh * Lq + rows, mask=mine, other=0.0)
        factor *= inverse
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
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
            k_base,
            v_base,
            k_l,
            v_l,
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
            k_base,
            v_base,
            k_l,
            v_l,
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
    put(dq + b * dq_b + h * dq_h, rows, dq_l, mine, acc * factor[:, None], D, BLOCK_D)
