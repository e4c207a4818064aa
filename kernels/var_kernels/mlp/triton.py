"""GELU between the two matrix products of the MLP.

It exists as a separate pass between the vendor's products and as a part of our own products.

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


@triton.jit
def block(
    source, row, col, rows, cols, stride, R: tl.constexpr, C: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """Load R x C numbers of a matrix from (row, col), with 0 outside of the matrix.

    A tensor descriptor has its own shape and strides.
    """
    if DESCRIPTOR:
        values = source.load([row, col])
    else:
        r, c = row + tl.arange(0, R), col + tl.arange(0, C)
        place = source + r[:, None].to(tl.int64) * stride + c[None, :]
        values = tl.load(place, mask=(r[:, None] < rows) & (c[None, :] < cols), other=0.0)
    return values


@triton.jit
def product(
    x,
    w,
    row,
    col,
    M,
    N,
    K,
    x_stride,
    w_stride,
    W_BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return a BLOCK_M x BLOCK_N tile of a matrix product in float32.

    The product is x w^T with w (N, K) if W_BY_ROW is set, else x w with w (K, N).
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a = block(x, row, k, M, K, x_stride, BLOCK_M, BLOCK_K, DESCRIPTOR)
        if W_BY_ROW:
            b = tl.trans(block(w, col, k, N, K, w_stride, BLOCK_N, BLOCK_K, DESCRIPTOR))
        else:
            b = block(w, k, col, K, N, w_stride, BLOCK_K, BLOCK_N, DESCRIPTOR)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def place_of(number, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the row and the column of tile `number`.

    The order goes GROUP tiles down and then one tile across, so that neighbouring programs share
    what is in the L2 cache.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = number // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    within = number % (GROUP * across)
    return (band * GROUP + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def linear_gelu(
    x,
    w,
    bias,
    h,
    a,
    M,
    N,
    K,
    x_stride,
    w_stride,
    KEEP_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write h = x w^T + bias and a = gelu(h), both (M, N), without another pass over h.

    The kernel is persistent: each of the n programs computes every n-th tile.
    """
    for number in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)
    ):
        row, col = place_of(number, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = product(
            x,
            w,
            row,
            col,
            M,
            N,
            K,
            x_stride,
            w_stride,
            True,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DESCRIPTOR,
            UPCAST,
            PRECISION,
            STAGES,
        )
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        v = (acc + tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]).to(
            a.dtype.element_ty
        )
        out, inside = (
            rows[:, None].to(tl.int64) * N + cols[None, :],
            (rows[:, None] < M) & (cols[None, :] < N),
        )
        if KEEP_H:
            tl.store(h + out, v, mask=inside)
        # The GELU uses the rounded value, so that the backward pass sees the same h.
        v = v.to(tl.float32)
        tl.store(a + out, (v * share(v)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def linear_gelu_backward(
    dy,
    w,
    h,
    dh,
    a,
    partial,
    M,
    N,
    K,
    dy_stride,
    w_stride,
    WRITE_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write dh = (dy w) gelu'(h), a = gelu(h), and the column sums of each row of tiles.

    The column sums are partial (tiles down, N) float32.
    """
    for number in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)
    ):
        row, col = place_of(number, M, N, BLOCK_M, BLOCK_N, GROUP)
        g = product(
            dy,
            w,
            row,
            col,
            M,
            N,
            K,
            dy_stride,
            w_stride,
            False,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DESCRIPTOR,
            UPCAST,
            PRECISION,
            STAGES,
        )
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        out, inside = (
            rows[:, None].to(tl.int64) * N + cols[None, :],
            (rows[:, None] < M) & (cols[None, :] < N),
        )
        v = tl.load(h + out, mask=inside, other=0.0).to(tl.float32)
        s = share(v)
        d = g * slope(v, s)
        tl.store(partial + (row // BLOCK_M) * N + cols, tl.sum(d, axis=0), mask=cols < N)
        tl.store(dh + out, d.to(dh.dtype.element_ty), mask=inside)
        if WRITE_A:
            tl.store(a + out, (v * s).to(a.dtype.element_ty), mask=inside)
