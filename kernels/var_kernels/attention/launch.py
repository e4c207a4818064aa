"""The launches of the attention kernels: sizes, strides and settings from tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_kernels.attention.config import Tile, config_for, max_width
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
    out = torch.empty(B, l, H, D, dtype=qkv.dtype, device=qkv.device)
    (q, k, v), block = split(qkv), 32
    keys, values = (kv.transpose(1, 2)[:, start:] for kv in cache)
    triton_tiles.append[(-(-l // block), B * H)](
        q=q,
        k=k,
        v=v,
        q_out=out,
        k_out=keys,
        v_out=values,
        log_scale=None if log_scale is None else log_scale.contiguous(),
        strides=strides(q),
        out_strides=strides(out),
        cache_strides=strides(keys),
        H=H,
        L=l,
        NORM=log_scale is not None,
        D=D,
        BLOCK=block,
        BLOCK_D=block_d(D),
        num_warps=4,
    )
    return out


def settings_of(D: int, dtype: torch.dtype) -> dict[str, Any]:
    """The settings that all kernels of a call share."""
    return {
        "D": D,
        "BLOCK_D": block_d(D),
        "UPCAST": INTERPRETED,
        "PRECISION": precision(dtype),
    }


def strides(x: Tensor) -> tuple[int, int, int]:
    """Batch, token and head stride of (B, L, H, D); the channels of a head must lie side by
    side."""
    require(x.stride(3) == 1, "attention: the channels of a head must be contiguous")
    return x.stride(0), x.stride(1), x.stride(2)


def tile_settings(tile: Tile) -> dict[str, Any]:
    """The settings of one kernel that are not sizes of its tiles."""
    return {"STAGES": tile.stages, "num_warps": tile.warps, "maxnreg": tile.registers}


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
            x=k,
            out=inv_k,
            strides=strides(k),
            H=H,
            L=Lk,
            D=D,
            BLOCK=64,
            BLOCK_D=settings["BLOCK_D"],
        )
    triton_forward.forward[(len(tiles.table) * B * H,)](
        q=q,
        k=k,
        v=v,
        o=o,
        lse=lse,
        inv_q=inv_q,
        inv_k=inv_k,
        log_scale=log_scale,
        tiles=tiles.table,
        row_lo=tiles.lo,
        row_hi=tiles.hi,
        sm_scale=sm_scale,
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        o_strides=strides(o),
        count=len(tiles.table),
        H=H,
        Lq=Lq,
        Lk=Lk,
        NORM=norm,
        BOUND=norm and q.dtype == torch.bfloat16,
        BLOCK_M=mine.rows,
        BLOCK_N=mine.inner,
        **tile_settings(mine),
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
    from var_kernels.attention import triton_backward

    B, Lq, H, D = q.shape
    Lk = k.shape[1]
    config, norm = config_for(D, generation(q.device), q.element_size(), Lk), log_scale is not None
    log_scale = None if log_scale is None else log_scale.contiguous()
    do = do if do.stride(3) == 1 and 0 not in do.stride() else do.contiguous()
    delta = torch.empty(B, H, Lq, dtype=torch.float32, device=q.device)
    parts = torch.empty(B, H, Lq if norm else 0, dtype=torch.float32, device=q.device)
    shared = {
        "q": q,
        "k": k,
        "v": v,
        "do": do,
        "lse": lse,
        "delta": delta,
        "inv_q": inv_q,
        "inv_k": inv_k,
        "log_scale": log_scale,
        "sm_scale": sm_scale,
        "q_strides": strides(q),
        "k_strides": strides(k),
        "v_strides": strides(v),
        "do_strides": strides(do),
        "H": H,
        "Lq": Lq,
        "Lk": Lk,
        "NORM": norm,
        **settings_of(D, q.dtype),
    }
    mine = config.queries
    by_query = tiles_on(visible, mine.rows, q.device)
    # First, because it computes delta.
    triton_backward.backward_queries[(len(by_query.table) * B * H,)](
        o=o,
        dq=dq,
        dscale=parts,
        tiles=by_query.table,
        row_lo=by_query.lo,
        row_hi=by_query.hi,
        o_strides=strides(o),
        dq_strides=strides(dq),
        count=len(by_query.table),
        BLOCK_M=mine.rows,
        BLOCK_N=mine.inner,
        **shared,
        **tile_settings(mine),
    )
    mine = config.keys
    by_key = tiles_on(visible.transposed, mine.rows, q.device)
    triton_backward.backward_keys[(len(by_key.table) * B * H,)](
        dk=dk,
        dv=dv,
        tiles=by_key.table,
        key_lo=by_key.lo,
        key_hi=by_key.hi,
        dk_strides=strides(dk),
        dv_strides=strides(dv),
        count=len(by_key.table),
        BLOCK_N=mine.rows,
        BLOCK_M=mine.inner,
        **shared,
        **tile_settings(mine),
    )
    if log_scale is None:
        return parts.new_zeros(H)
    return torch.where(log_scale.float() < MAX_LOG_SCALE, parts.sum((0, 2)), 0.0)
