"""What the attention kernels share: tiles in memory, products, and the kernels that read every
vector once (norms, the cache of sampling).

UPCAST casts the operands of tl.dot to float32: for Triton's interpreter, whose bfloat16 arithmetic
is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-12)
"""the smallest norm that q and k are divided by, as in F.normalize"""


@triton.jit
def dot(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a b in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matrix(x, strides, b, h):
    """The matrix (L, D) of one head, as (pointer, stride of its rows). `strides` are those of
    batch, token and head; the channels of a head lie side by side."""
    return x + b * strides[0] + h * strides[2], strides[1]


@triton.jit
def tile(x, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows of a `matrix` as (rows, BLOCK_D); rows that are not `valid` and channels past D are 0.
    WHOLE: all rows are valid."""
    d = tl.arange(0, BLOCK_D)
    place = x[0] + rows[:, None] * x[1] + d[None, :]
    if WHOLE and BLOCK_D == D:
        return tl.load(place)
    if WHOLE:
        return tl.load(place, mask=d[None, :] < D, other=0.0)
    if BLOCK_D == D:
        return tl.load(place, mask=valid[:, None], other=0.0)
    return tl.load(place, mask=valid[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def put(x, rows, valid, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `tile`, in the type of the matrix."""
    d = tl.arange(0, BLOCK_D)
    tl.store(
        x[0] + rows[:, None] * x[1] + d[None, :],
        values.to(x[0].dtype.element_ty),
        mask=valid[:, None] & (d[None, :] < D),
    )


@triton.jit
def head_factor(log_scale, h, sm_scale, NORM: tl.constexpr):
    """exp(min(s_h, ln 100)), or sm_scale."""
    if NORM:
        return tl.exp(tl.minimum(tl.load(log_scale + h).to(tl.float32), 4.605170185988092))
    return sm_scale


@triton.jit
def tile_of(tiles, count, H):
    """The tile of this program, from a table of `count` tiles: its head as (b, h, b H + h), its
    rows as (start, stop), and what they see as (lo, hi, full_lo, full_hi); see schedule.py.

    The tiles of a head lie side by side in the grid.
    """
    table = tiles + tl.program_id(0) % count * 6
    bh = (tl.program_id(0) // count).to(tl.int64)
    start, stop = tl.load(table), tl.load(table + 1)
    lo, hi = tl.load(table + 2), tl.load(table + 3)
    return bh // H, bh % H, bh, start, stop, lo, hi, tl.load(table + 4), tl.load(table + 5)


@triton.jit
def parts(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """The blocks of [lo, hi), of which all rows see [full_lo, full_hi): (blocks at the start that
    only some rows see, start of those that all see, number of whole blocks of these, blocks
    after)."""
    head = tl.cdiv(full_lo - lo, BLOCK)
    middle = lo + head * BLOCK
    whole = tl.maximum(full_hi - middle, 0) // BLOCK
    return head, middle, whole, tl.cdiv(tl.maximum(hi - middle - whole * BLOCK, 0), BLOCK)


@triton.jit
def inverse_norms(
    x, out, strides, H, L, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out (B, H, L) = 1 / max(|x|, 1e-12) of each head's vector."""
    bh = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tile(matrix(x, strides, bh // H, bh % H), rows, rows < L, D, BLOCK_D).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), NORM_EPS)
    tl.store(out + bh * L + rows, 1.0 / norm, mask=rows < L)


@triton.jit
def append(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    log_scale,
    strides,
    out_strides,
    cache_strides,
    H,
    L,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of tokens of one head: q, normalised and scaled, to q_out (B, L, H, D), and k and v
    to their places in the cache. q, k and v share `strides`."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < L
    q_tile = tile(matrix(q, strides, b, h), rows, valid, D, BLOCK_D)
    k_tile = tile(matrix(k, strides, b, h), rows, valid, D, BLOCK_D)
    v_tile = tile(matrix(v, strides, b, h), rows, valid, D, BLOCK_D)
    q_place = matrix(q_out, out_strides, b, h)
    k_place, v_place = matrix(k_out, cache_strides, b, h), matrix(v_out, cache_strides, b, h)
    if NORM:
        q_wide, k_wide = q_tile.to(tl.float32), k_tile.to(tl.float32)
        factor = head_factor(log_scale, h, 1.0, NORM) / tl.maximum(
            tl.sqrt(tl.sum(q_wide * q_wide, axis=1)), NORM_EPS
        )
        put(q_place, rows, valid, q_wide * factor[:, None], D, BLOCK_D)
        norm = tl.maximum(tl.sqrt(tl.sum(k_wide * k_wide, axis=1)), NORM_EPS)
        put(k_place, rows, valid, k_wide / norm[:, None], D, BLOCK_D)
    else:
        put(q_place, rows, valid, q_tile, D, BLOCK_D)
        put(k_place, rows, valid, k_tile, D, BLOCK_D)
    put(v_place, rows, valid, v_tile, D, BLOCK_D)
