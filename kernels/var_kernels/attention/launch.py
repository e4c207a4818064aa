"""The launches of the attention kernels: sizes, strides and settings from tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_kernels.attention.config import config_for, max_width
from var_kernels.attention.reference import MAX_LOG_SCALE
from var_kernels.attention.schedule import Visible, tiles_on
from var_kernels.dispatch import INTERPRETED, generation, launches, precision, require


def split(packed_BL3HD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k, v."""
    q_BLHD, k_BLHD, v_BLHD = packed_BL3HD.unbind(2)
    return q_BLHD, k_BLHD, v_BLHD


def block_d(D: int) -> int:
    """Channels of a tile: a power of two that holds a head, and at least the 16 of tl.dot."""
    return max(16, 1 << (D - 1).bit_length())


@launches
def launch_append(qkv: Tensor, cache: Tensor, start: int, log_scale: Tensor | None) -> Tensor:
    """The Triton form of `append_to_cache`."""
    from var_kernels.attention import triton_tiles

    B, l, _, H, D = qkv.shape
    q = torch.empty(B, l, H, D, dtype=qkv.dtype, device=qkv.device)
    block, norm = 32, log_scale is not None
    place = cache[0, :, :, start:]
    triton_tiles.append[(-(-l // block), B * H)](
        *split(qkv),
        q,
        place,
        cache[1, :, :, start:],
        None if log_scale is None else log_scale.contiguous(),
        qkv.stride(0),
        qkv.stride(1),
        qkv.stride(3),
        place.stride(0),
        place.stride(1),
        place.stride(2),
        H,
        l,
        NORM=norm,
        D=D,
        BLOCK=block,
        BLOCK_D=block_d(D),
        num_warps=4,
    )
    return q


def settings_of(D: int, dtype: torch.dtype) -> dict[str, Any]:
    """The settings that all kernels of a call share."""
    return {
        "D": D,
        "BLOCK_D": block_d(D),
        "UPCAST": INTERPRETED,
        "PRECISION": precision(dtype),
    }


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Batch, token and head stride of each; the channels of a head must lie side by side."""
    out: tuple[int, ...] = ()
    for t in tensors:
        require(t.stride(3) == 1, "attention: the channels of a head must be contiguous")
        out += (t.stride(0), t.stride(1), t.stride(2))
    return out


@launches
def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor | None, visible: Visible, sm_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton forward pass: o (B, L, H, D), and lse in units of log2, 1/|q| and 1/|k|, each
    (B, H, L) float32."""
    from var_kernels.attention import triton_forward, triton_tiles

    B, Lq, H, D = q.shape
    Lk = k.shape[1]
    widest = max_width(q.element_size())
    require(
        widest >= D,
        "attention: heads of {} channels are wider than {} ({}); use another back-end",
        D,
        widest,
        q.dtype,
    )
    require(sm_scale > 0, "attention: sm_scale {} is not positive", sm_scale)
    config, norm = config_for(D, generation(q.device), q.element_size(), Lk), log_scale is not None
    settings, log_scale = (
        settings_of(D, q.dtype),
        None if log_scale is None else log_scale.contiguous(),
    )
    o = torch.empty(B, Lq, H, D, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, H, Lq, dtype=torch.float32, device=q.device)
    inv_q = torch.empty(B, H, Lq if norm else 0, dtype=torch.float32, device=q.device)
    inv_k = torch.empty(B, H, Lk if norm else 0, dtype=torch.float32, device=q.device)
    mine = config.forward
    tiles = tiles_on(visible, mine.rows, q.device)
    if norm:
        triton_tiles.inverse_norms[(B * H, -(-Lk // 64))](
            k, inv_k, *strides(k), H, Lk, D=D, BLOCK=64, BLOCK_D=settings["BLOCK_D"]
        )
    count = len(tiles.table)
    triton_forward.forward[(count * B * H,)](
        q,
        k,
        v,
        o,
        lse,
        inv_q,
        inv_k,
        log_scale,
        tiles.table,
        tiles.lo,
        tiles.hi,
        sm_scale,
        *strides(q, k, v),
        count,
        H,
        Lq,
        Lk,
        NORM=norm,
        BOUND=norm and q.dtype == torch.bfloat16,
        BLOCK_M=mine.rows,
        BLOCK_N=mine.inner,
        STAGES=mine.stages,
        num_warps=mine.warps,
        **settings,
    )
    return o, lse, inv_q, inv_k


@launches
def launch_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    inv_q: Tensor,
    inv_k: Tensor,
    log_scale: Tensor | None,
    visible: Visible,
    sm_scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """The Triton backward pass: writes dq, dk and dv, any views with contiguous channels, and
    returns the gradient of `log_scale` (H,) float32."""
    from var_kernels.attention import triton_backward, triton_tiles

    B, Lq, H, D = q.shape
    Lk = k.shape[1]
    config, norm = config_for(D, generation(q.device), q.element_size(), Lk), log_scale is not None
    settings, log_scale = (
        settings_of(D, q.dtype),
        None if log_scale is None else log_scale.contiguous(),
    )
    do = do if do.stride(3) == 1 and 0 not in do.stride() else do.contiguous()
    delta = torch.empty(B, H, Lq, dtype=torch.float32, device=q.device)
    triton_tiles.weighted_dots[(B * H, -(-Lq // 64))](
        o, do, delta, *strides(o, do), H, Lq, D=D, BLOCK=64, BLOCK_D=settings["BLOCK_D"]
    )
    mine = config.keys
    by_key = tiles_on(visible.transposed, mine.rows, q.device)
    triton_backward.backward_keys[(len(by_key.table) * B * H,)](
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
        by_key.table,
        by_key.lo,
        by_key.hi,
        sm_scale,
        *strides(q, k, v, do, dk, dv),
        len(by_key.table),
        H,
        Lq,
        Lk,
        NORM=norm,
        BLOCK_N=mine.rows,
        BLOCK_M=mine.inner,
        STAGES=mine.stages,
        num_warps=mine.warps,
        **settings,
    )
    mine = config.queries
    by_query = tiles_on(visible, mine.rows, q.device)
    parts = torch.empty(B, H, Lq if norm else 0, dtype=torch.float32, device=q.device)
    triton_backward.backward_queries[(len(by_query.table) * B * H,)](
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
        parts,
        by_query.table,
        by_query.lo,
        by_query.hi,
        sm_scale,
        *strides(q, k, v, do, dq),
        len(by_query.table),
        H,
        Lq,
        Lk,
        NORM=norm,
        BLOCK_M=mine.rows,
        BLOCK_N=mine.inner,
        STAGES=mine.stages,
        num_warps=mine.warps,
        **settings,
    )
    if log_scale is None:
        return parts.new_zeros(H)
    return torch.where(log_scale.float() < MAX_LOG_SCALE, parts.sum((0, 2)), 0.0)
