"""Block-causal attention: softmax over the keys of a tile's scales, block after block, forward and backward, without an L x L mask.

Tiles end where scales end (schedule.py), so that all rows of a tile see the same keys; only the last, partly filled block is masked, in a
loop of its own (masks on the loads of the main loop cost 15 to 25 % of the forward pass on an H200).
The L2 norm of q and k is not applied to the tiles: q k^T of the raw ones is multiplied by 1/|q|, 1/|k| and the head's scale in float32,
which spares a rounding and keeps k going straight from shared memory into the tensor cores. The gradients are taken in two kernels, one a
tile of keys and one a tile of queries, each summing in its own registers: no atomics, so two runs agree bit for bit.

UPCAST casts the operands of tl.dot to float32: for Triton's interpreter, whose bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-12)
"""the smallest norm that q and k are divided by, as in F.normalize"""
MOST = tl.constexpr(40.0)
"""largest scale of a head for which exp(s - scale), s between -scale and scale, keeps all its digits in float32 and bfloat16: e^-80"""


@triton.jit
def dot(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a b in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def tile(base, rows, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows of a (L, D) matrix as (rows, BLOCK_D); rows that are not `valid` and channels past D are 0. WHOLE: all rows are valid."""
    d = tl.arange(0, BLOCK_D)
    place = base + rows[:, None] * stride + d[None, :]
    if WHOLE and BLOCK_D == D:
        return tl.load(place)
    if WHOLE:
        return tl.load(place, mask=d[None, :] < D, other=0.0)
    if BLOCK_D == D:
        return tl.load(place, mask=valid[:, None], other=0.0)
    return tl.load(place, mask=valid[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def put(base, rows, stride, valid, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `tile`, in the type of `base`."""
    d = tl.arange(0, BLOCK_D)
    tl.store(base + rows[:, None] * stride + d[None, :], values.to(base.dtype.element_ty), mask=valid[:, None] & (d[None, :] < D))


@triton.jit
def inverse_norms(x, out, x_b, x_l, x_h, H, L, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (B, H, L) = 1 / max(|x|, 1e-12) of each head's vector."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tile(x + b * x_b + h * x_h, rows, x_l, rows < L, D, BLOCK_D).to(tl.float32)
    tl.store(out + bh * L + rows, 1.0 / tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), NORM_EPS), mask=rows < L)


@triton.jit
def append(
    q, k, v, q_out, k_out, v_out, log_scale, b_stride, l_stride, h_stride, cache_b, cache_h, cache_l, H, L,
    NORM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one head: q as the softmax wants it to q_out (B, L, H, D), k and v to their places of the cache."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid, here, there = rows < L, b * b_stride + h * h_stride, b * cache_b + h * cache_h
    q_tile, k_tile = tile(q + here, rows, l_stride, valid, D, BLOCK_D), tile(k + here, rows, l_stride, valid, D, BLOCK_D)
    if NORM:
        q_wide, k_wide = q_tile.to(tl.float32), k_tile.to(tl.float32)
        factor = head_factor(log_scale, h, 1.0, NORM) / tl.maximum(tl.sqrt(tl.sum(q_wide * q_wide, axis=1)), NORM_EPS)
        put(q_out + (b * L * H + h) * D, rows, H * D, valid, q_wide * factor[:, None], D, BLOCK_D)
        norm = tl.maximum(tl.sqrt(tl.sum(k_wide * k_wide, axis=1)), NORM_EPS)
        put(k_out + there, rows, cache_l, valid, k_wide / norm[:, None], D, BLOCK_D)
    else:
        put(q_out + (b * L * H + h) * D, rows, H * D, valid, q_tile, D, BLOCK_D)
        put(k_out + there, rows, cache_l, valid, k_tile, D, BLOCK_D)
    put(v_out + there, rows, cache_l, valid, tile(v + here, rows, l_stride, valid, D, BLOCK_D), D, BLOCK_D)


@triton.jit
def weighted_dots(x, y, out, x_b, x_l, x_h, y_b, y_l, y_h, H, L, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (B, H, L) = sum over D of x y: the term of the softmax backward, from o and its gradient."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tile(x + b * x_b + h * x_h, rows, x_l, rows < L, D, BLOCK_D).to(tl.float32)
    c = tile(y + b * y_b + h * y_h, rows, y_l, rows < L, D, BLOCK_D).to(tl.float32)
    tl.store(out + bh * L + rows, tl.sum(a * c, axis=1), mask=rows < L)


@triton.jit
def head_factor(log_scale, h, sm_scale, NORM: tl.constexpr):
    """exp(min(s_h, ln 100)), or sm_scale."""
    if NORM:
        return tl.exp(tl.minimum(tl.load(log_scale + h).to(tl.float32), 4.605170185988092))
    return sm_scale


@triton.jit
def attend(
    acc, top, total, q, factor, lo, hi, n, kv_hi, k_base, v_base, k_l, v_l, inv_k,
    MASKED: tl.constexpr, BOUNDED: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the softmax. `factor` (rows,) holds the scale of q in units of log2; BOUNDED: `top` is above all and stays."""
    keys = n + tl.arange(0, BLOCK_N)
    valid = keys < kv_hi
    k = tile(k_base, keys, k_l, valid, D, BLOCK_D, not MASKED)
    s = dot(q, tl.trans(k), UPCAST, PRECISION)
    if NORM:
        s *= (tl.load(inv_k + keys, mask=valid, other=0.0) if MASKED else tl.load(inv_k + keys))[None, :]
    if MASKED:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    new = top
    if not BOUNDED:
        new = tl.maximum(top, tl.max(s, axis=1) * factor)
    safe = tl.where(new == float("-inf"), 0.0, new) if MASKED and not BOUNDED else new  # a row that has not met a key of its own yet
    p = tl.exp2(s * factor[:, None] - safe[:, None])
    if not BOUNDED:
        fade = tl.exp2(top - safe)
        acc, total = acc * fade[:, None], total * fade
    v = tile(v_base, keys, v_l, valid, D, BLOCK_D, not MASKED)
    return acc + dot(p.to(v.dtype), v, UPCAST, PRECISION), new, total + tl.sum(p, axis=1)


@triton.jit
def parts(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """How [lo, hi) is walked in blocks, of which [full_lo, full_hi) is seen by all: (blocks at the start that only some see, where those
    begin that all see, how many whole ones these are, blocks after them)."""
    head = tl.cdiv(full_lo - lo, BLOCK)
    middle = lo + head * BLOCK
    whole = tl.maximum(full_hi - middle, 0) // BLOCK
    return head, middle, whole, tl.cdiv(tl.maximum(hi - middle - whole * BLOCK, 0), BLOCK)


@triton.jit
def sweep(
    acc, top, total, q, factor, lo, hi, kv_lo, kv_hi, full_lo, full_hi, k_base, v_base, k_l, v_l, inv_k,
    BOUNDED: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All keys of a tile of queries: those that all rows see, then those that only some do, and a last block that is not full."""
    head, middle, whole, tail = parts(kv_lo, kv_hi, full_lo, full_hi, BLOCK_N)
    for i in tl.range(0, whole, num_stages=STAGES):
        acc, top, total = attend(acc, top, total, q, factor, lo, hi, middle + i * BLOCK_N, kv_hi, k_base, v_base, k_l, v_l, inv_k,
                                 False, BOUNDED, NORM, D, BLOCK_N, BLOCK_D, UPCAST, PRECISION)  # fmt: skip
    for i in tl.range(0, head + tail):
        n = tl.where(i < head, kv_lo + i * BLOCK_N, middle + (whole + i - head) * BLOCK_N)
        acc, top, total = attend(acc, top, total, q, factor, lo, hi, n, kv_hi, k_base, v_base, k_l, v_l, inv_k,
                                 True, BOUNDED, NORM, D, BLOCK_N, BLOCK_D, UPCAST, PRECISION)  # fmt: skip
    return acc, top, total


@triton.jit
def highest(
    q, factor, lo, hi, kv_lo, kv_hi, k_base, k_l, inv_k,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row, in a pass of its own."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for n in tl.range(kv_lo, kv_hi, BLOCK_N, num_stages=1):
        keys = n + tl.arange(0, BLOCK_N)
        valid = keys < kv_hi
        s = dot(q, tl.trans(tile(k_base, keys, k_l, valid, D, BLOCK_D)), UPCAST, PRECISION)
        s *= tl.load(inv_k + keys, mask=valid, other=0.0)[None, :]
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
        top = tl.maximum(top, tl.max(s, axis=1) * factor)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def forward(
    q, k, v, o, lse, inv_q, inv_k, log_scale, tiles, row_lo, row_hi, sm_scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, count, H, Lq, Lk,
    NORM: tl.constexpr, BOUND: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: o (B, L, H, D), lse (B, H, L) in units of log2, and 1/|q|."""
    table, bh = tiles + tl.program_id(0) % count * 6, (tl.program_id(0) // count).to(tl.int64)  # tiles of a head side by side
    b, h = bh // H, bh % H
    start, stop, kv_lo, kv_hi = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    full_lo, full_hi = tl.load(table + 4), tl.load(table + 5)
    rows = start + tl.arange(0, BLOCK_M)
    mine = rows < stop
    lo, hi = tl.load(row_lo + rows, mask=mine, other=0), tl.load(row_hi + rows, mask=mine, other=0)
    q_tile = tile(q + b * q_b + h * q_h, rows, q_l, mine, D, BLOCK_D)
    scale = head_factor(log_scale, h, sm_scale, NORM)
    factor = tl.full([BLOCK_M], LOG2E, tl.float32) * scale
    if NORM:
        wide = q_tile.to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), NORM_EPS)
        tl.store(inv_q + bh * Lq + rows, inverse, mask=mine)
        factor *= inverse
    k_base, v_base, norms = k + b * k_b + h * k_h, v + b * v_b + h * v_h, inv_k + bh * Lk
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if BOUND:  # |q/|q| k/|k|| <= 1: where the head's scale leaves room, the softmax needs no maximum but the scale itself
        top = tl.full([BLOCK_M], LOG2E, tl.float32) * scale
        if scale >= MOST:
            top = highest(q_tile, factor, lo, hi, kv_lo, kv_hi, k_base, k_l, norms, D, BLOCK_N, BLOCK_D, UPCAST, PRECISION)
    acc, top, total = sweep(acc, top, total, q_tile, factor, lo, hi, kv_lo, kv_hi, full_lo, full_hi, k_base, v_base, k_l, v_l, norms,
                            BOUND, NORM, D, BLOCK_N, BLOCK_D, UPCAST, PRECISION, STAGES)  # fmt: skip
    put(o + (b * Lq * H + h) * D, rows, H * D, mine, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + bh * Lq + rows, top + tl.log2(total), mask=mine)


@triton.jit
def keys_step(
    dk, dv, k, v, k_factor, scale, lo, hi, start, last, q_base, do_base, q_l, do_l, lse, delta, inv_q,
    MASKED: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
    ds = p * (dot(v, tl.trans(do), UPCAST, PRECISION) - tl.load(delta + rows, mask=valid, other=0.0)[None, :])
    if q.dtype == tl.float16:  # 1/|q| may be beyond float16; q/|q| is not
        unit = q.to(tl.float32) * (factor / scale)[:, None]
        dk += dot(ds.to(q.dtype), unit.to(q.dtype), UPCAST, PRECISION) * scale
    else:
        dk += dot((ds * factor[None, :]).to(q.dtype), q, UPCAST, PRECISION)
    return dk, dv


@triton.jit
def backward_keys(
    q, k, v, do, lse, delta, inv_q, inv_k, log_scale, dk, dv, tiles, key_lo, key_hi, sm_scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, do_b, do_l, do_h, dk_b, dk_l, dk_h, dv_b, dv_l, dv_h, count, H, Lq, Lk,
    NORM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: a loop over the queries that see any of them. `tiles` is the transposed table."""
    table, bh = tiles + tl.program_id(0) % count * 6, (tl.program_id(0) // count).to(tl.int64)  # tiles of a head side by side
    b, h = bh // H, bh % H
    start, stop, first, last = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    full_lo, full_hi = tl.load(table + 4), tl.load(table + 5)
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
    if full_hi == last:  # rows past the end are zeros, with a weight of 0: the last block needs no mask either
        whole, tail = whole + tail, 0
    for i in tl.range(0, whole, num_stages=STAGES):
        dk_acc, dv_acc = keys_step(
            dk_acc, dv_acc, k_tile, v_tile, k_factor, scale, lo, hi, middle + i * BLOCK_M, last, q_base, do_base, q_l, do_l, lse_base,
            delta_base, inv_base, False, NORM, D, BLOCK_M, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, head + tail):
        row = tl.where(i < head, first + i * BLOCK_M, middle + (whole + i - head) * BLOCK_M)
        dk_acc, dv_acc = keys_step(
            dk_acc, dv_acc, k_tile, v_tile, k_factor, scale, lo, hi, row, last, q_base, do_base, q_l, do_l, lse_base,
            delta_base, inv_base, True, NORM, D, BLOCK_M, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip
    if NORM:  # through k / |k|: the part along k is lost
        normal = k_tile.to(tl.float32) * k_factor[:, None]
        along = tl.where(k_factor < 1.0 / NORM_EPS, tl.sum(normal * dk_acc, axis=1), 0.0)
        dk_acc = (dk_acc - normal * along[:, None]) * k_factor[:, None]
    put(dk + b * dk_b + h * dk_h, keys, dk_l, mine, dk_acc, D, BLOCK_D)
    put(dv + b * dv_b + h * dv_h, keys, dv_l, mine, dv_acc, D, BLOCK_D)


@triton.jit
def queries_step(
    acc, q, do, factor, row_lse, row_delta, lo, hi, start, last, k_base, v_base, k_l, v_l, inv_k,
    MASKED: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys, added to dq (before the norm) of a tile of queries."""
    keys = start + tl.arange(0, BLOCK_N)
    valid = keys < last
    k, v = tile(k_base, keys, k_l, valid, D, BLOCK_D, not MASKED), tile(v_base, keys, v_l, valid, D, BLOCK_D, not MASKED)
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
        return acc + dot(ds.to(k.dtype), (k.to(tl.float32) * norms[:, None]).to(k.dtype), UPCAST, PRECISION)
    return acc + dot((ds * norms[None, :]).to(k.dtype), k, UPCAST, PRECISION)


@triton.jit
def backward_queries(
    q, k, v, do, lse, delta, inv_q, inv_k, log_scale, dq, dscale, tiles, row_lo, row_hi, sm_scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, do_b, do_l, do_h, dq_b, dq_l, dq_h, count, H, Lq, Lk,
    NORM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and each query's part of the gradient of its head's scale: dscale (B, H, L). Their sum is taken outside:
    Triton 3.7 cannot compile it here for Blackwell (a sum to one number of a sum over a tile in tensor memory)."""
    table, bh = tiles + tl.program_id(0) % count * 6, (tl.program_id(0) // count).to(tl.int64)  # tiles of a head side by side
    b, h = bh // H, bh % H
    start, stop, kv_lo, kv_hi = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    full_lo, full_hi = tl.load(table + 4), tl.load(table + 5)
    rows = start + tl.arange(0, BLOCK_M)
    mine = rows < stop
    lo, hi = tl.load(row_lo + rows, mask=mine, other=0), tl.load(row_hi + rows, mask=mine, other=0)
    q_tile = tile(q + b * q_b + h * q_h, rows, q_l, mine, D, BLOCK_D)
    do_tile = tile(do + b * do_b + h * do_h, rows, do_l, mine, D, BLOCK_D)
    row_lse, row_delta = tl.load(lse + bh * Lq + rows, mask=mine, other=0.0), tl.load(delta + bh * Lq + rows, mask=mine, other=0.0)
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
        acc = queries_step(acc, q_tile, do_tile, factor, row_lse, row_delta, lo, hi, middle + i * BLOCK_N, kv_hi, k_base, v_base, k_l, v_l,
                           norms, False, NORM, D, BLOCK_N, BLOCK_D, UPCAST, PRECISION)  # fmt: skip
    for i in tl.range(0, head + tail):
        n = tl.where(i < head, kv_lo + i * BLOCK_N, middle + (whole + i - head) * BLOCK_N)
        acc = queries_step(acc, q_tile, do_tile, factor, row_lse, row_delta, lo, hi, n, kv_hi, k_base, v_base, k_l, v_l,
                           norms, True, NORM, D, BLOCK_N, BLOCK_D, UPCAST, PRECISION)  # fmt: skip
    if NORM:
        normal = q_tile.to(tl.float32) * inverse[:, None]
        along = tl.sum(normal * acc, axis=1)
        tl.store(dscale + bh * Lq + rows, along * head_factor(log_scale, h, sm_scale, NORM), mask=mine)
        acc -= normal * tl.where(inverse < 1.0 / NORM_EPS, along, 0.0)[:, None]
    put(dq + b * dq_b + h * dq_h, rows, dq_l, mine, acc * factor[:, None], D, BLOCK_D)
