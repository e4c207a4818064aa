"""The public functions: block_attention for training (packed qkv, differentiable) and cached_attention for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from var_kernels.attention import reference
from var_kernels.attention.config import config_for, max_width
from var_kernels.attention.reference import MAX_LOG_SCALE
from var_kernels.attention.schedule import Pattern, Visible, counts, everything, scales_of, tiles_on
from var_kernels.dispatch import INTERPRETED, eager, generation, launches, require, use_triton


def block_attention(
    qkv_BL3HD: Tensor,
    patch_nums: Sequence[int | tuple[int, int]],
    log_scale_H: Tensor | None = None,
    sm_scale: float = 1.0,
    pattern: Pattern = "full",
) -> Tensor:
    """Attention of all tokens of a scale schedule, each over the scales its pattern lets it see; returns (B, L, H D).

    `qkv_BL3HD` is the packed projection, read as it lies; `patch_nums` the side of each scale's grid, or (height, width). With
    `log_scale_H` (one number a head, in any shape) the reference's attn_l2_norm: q <- q/|q| exp(min(s, ln 100)), k <- k/|k|, no other
    scale; without it q k^T is multiplied by `sm_scale`. `pattern`: full, own, or how many scales (schedule.py). On GPUs heads are at most
    128 channels wide in half precision, 64 in float32.
    ValueError: L is not the schedule's length, an unknown pattern, not one scale a head.
    """
    for side in patch_nums:
        fits = isinstance(side, int) or len(side) == 2
        require(fits and min((side,) if isinstance(side, int) else side) > 0, "attention: patch_nums {} are not grid sides", patch_nums)
    schedule = counts(patch_nums)
    require(qkv_BL3HD.ndim == 5 and qkv_BL3HD.shape[2] == 3, "attention: qkv is (B, L, 3, H, D), not {}", qkv_BL3HD.shape)
    B, L, _, H, D = qkv_BL3HD.shape
    require(sum(schedule) == L, "attention: qkv {} does not hold the tokens of patch_nums {}", qkv_BL3HD.shape, patch_nums)
    if log_scale_H is not None:
        require(log_scale_H.numel() == H, "attention: {} scales for {} heads", log_scale_H.numel(), H)
        log_scale_H = log_scale_H.reshape(H)
    arguments = (qkv_BL3HD, log_scale_H, list(schedule), str(pattern), float(sm_scale))
    if torch.compiler.is_compiling():
        return attention_op(*arguments)[0].reshape(B, L, H * D)
    if not use_triton(qkv_BL3HD):
        return reference.attention(*_split(qkv_BL3HD), scales_of(schedule, pattern), log_scale_H, sm_scale).reshape(B, L, H * D)
    return _eager(*arguments)[0].reshape(B, L, H * D)


def cached_attention(q_BlHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, sm_scale: float = 1.0) -> Tensor:
    """Queries of the scale that is being sampled over all keys so far (views of a cache), without gradients; (B, l, H, D).

    q and k come normalised where the model does so: the cache keeps normalised keys."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_BlHD, k_BLHD, v_BLHD)):
        raise RuntimeError("cached_attention has no gradient; call it under torch.no_grad(), or use block_attention")
    q, k, v = q_BlHD.shape, k_BLHD.shape, v_BLHD.shape
    fit = len(q) == 4 and k == v and q[::2] == k[::2] and q[3] == k[3]
    require(fit, "cached_attention: q (B, l, H, D) and k, v (B, L, H, D) are needed, not {}, {}, {}", q, k, v)
    visible = everything(q_BlHD.shape[1], k_BLHD.shape[1])
    if not use_triton(q_BlHD):
        return reference.attention(q_BlHD, k_BLHD, v_BLHD, visible, None, sm_scale)
    return launch_forward(q_BlHD, k_BLHD, v_BLHD, None, visible, sm_scale)[0]


def append_to_cache(qkv_Bl3HD: Tensor, cache_2BHLD: Tensor, start: int, log_scale_H: Tensor | None = None) -> Tensor:
    """The scale that is being sampled, packed (B, l, 3, H, D): its keys and values go to the cache (2, B, H, L, D) from place `start` on,
    its queries are returned (B, l, H, D). With `log_scale_H` the reference's attn_l2_norm: q/|q| exp(min(s, ln 100)) and k/|k|. Without
    gradients. ValueError: no room."""
    B, l, three, H, D = qkv_Bl3HD.shape
    room = cache_2BHLD.shape[:3] == (2, B, H) and cache_2BHLD.shape[4] == D and start + l <= cache_2BHLD.shape[3] and three == 3
    require(room, "append_to_cache: {} from place {} does not fit into a cache {}", qkv_Bl3HD.shape, start, cache_2BHLD.shape)
    if torch.is_grad_enabled() and qkv_Bl3HD.requires_grad:
        raise RuntimeError("append_to_cache has no gradient; call it under torch.no_grad()")
    if not use_triton(qkv_Bl3HD):
        q, k, v = reference.normalised(*_split(qkv_Bl3HD), log_scale_H)
        cache_2BHLD[0, :, :, start : start + l] = k.transpose(1, 2)
        cache_2BHLD[1, :, :, start : start + l] = v.transpose(1, 2)
        return q
    return _launch_append(qkv_Bl3HD, cache_2BHLD, start, log_scale_H)


@launches
def _launch_append(qkv: Tensor, cache: Tensor, start: int, log_scale: Tensor | None) -> Tensor:
    from var_kernels.attention import triton as kernels

    B, l, _, H, D = qkv.shape
    q = torch.empty(B, l, H, D, dtype=qkv.dtype, device=qkv.device)
    block, norm = 32, log_scale is not None
    place = cache[0, :, :, start:]
    kernels.append[(-(-l // block), B * H)](
        *_split(qkv), q, place, cache[1, :, :, start:], None if log_scale is None else log_scale.contiguous(), qkv.stride(0), qkv.stride(1),
        qkv.stride(3), place.stride(0), place.stride(1), place.stride(2), H, l, NORM=norm, D=D, BLOCK=block,
        BLOCK_D=max(16, 1 << (D - 1).bit_length()), num_warps=4,
    )  # fmt: skip
    return q


def _split(packed_BL3HD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k, v."""
    q_BLHD, k_BLHD, v_BLHD = packed_BL3HD.unbind(2)
    return q_BLHD, k_BLHD, v_BLHD


def _pattern(text: str) -> Pattern:
    return int(text) if text.isdigit() else text


def _settings(D: int, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel of a call shares. float32 products are exact unless the user allows TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"D": D, "BLOCK_D": max(16, 1 << (D - 1).bit_length()), "UPCAST": INTERPRETED, "PRECISION": "tf32" if tf32 else "ieee"}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
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
    """The Triton forward: (o (B, L, H, D), lse in log2 units, 1/|q|, 1/|k|), the last three (B, H, L) float32."""
    from var_kernels.attention import triton as kernels

    B, Lq, H, D = q.shape
    Lk = k.shape[1]
    widest = max_width(q.element_size())
    require(widest >= D, "attention: heads of {} channels are wider than {} ({}); use another back-end", D, widest, q.dtype)
    require(sm_scale > 0, "attention: sm_scale {} is not positive", sm_scale)
    config, norm = config_for(D, generation(q.device), q.element_size(), Lk), log_scale is not None
    settings, log_scale = _settings(D, q.dtype), None if log_scale is None else log_scale.contiguous()
    o = torch.empty(B, Lq, H, D, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, H, Lq, dtype=torch.float32, device=q.device)
    inv_q = torch.empty(B, H, Lq if norm else 0, dtype=torch.float32, device=q.device)
    inv_k = torch.empty(B, H, Lk if norm else 0, dtype=torch.float32, device=q.device)
    mine = config.forward
    tiles = tiles_on(visible, mine.rows, q.device)
    if norm:
        kernels.inverse_norms[(B * H, -(-Lk // 64))](k, inv_k, *_strides(k), H, Lk, D=D, BLOCK=64, BLOCK_D=settings["BLOCK_D"])
    count = len(tiles.table)
    kernels.forward[(count * B * H,)](
        q, k, v, o, lse, inv_q, inv_k, log_scale, tiles.table, tiles.lo, tiles.hi, sm_scale, *_strides(q, k, v), count, H, Lq, Lk,
        NORM=norm, BOUND=norm and q.dtype == torch.bfloat16, BLOCK_M=mine.rows, BLOCK_N=mine.inner, STAGES=mine.stages,
        num_warps=mine.warps, **settings,
    )  # fmt: skip
    return o, lse, inv_q, inv_k


@launches
def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, inv_q: Tensor, inv_k: Tensor, log_scale: Tensor | None,
    visible: Visible, sm_scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> Tensor:  # fmt: skip
    """The Triton backward: writes dq, dk, dv (any views with contiguous channels), returns the gradient of `log_scale` (H,) float32."""
    from var_kernels.attention import triton as kernels

    B, Lq, H, D = q.shape
    Lk = k.shape[1]
    config, norm = config_for(D, generation(q.device), q.element_size(), Lk), log_scale is not None
    settings, log_scale = _settings(D, q.dtype), None if log_scale is None else log_scale.contiguous()
    do = do if do.stride(3) == 1 and 0 not in do.stride() else do.contiguous()
    delta = torch.empty(B, H, Lq, dtype=torch.float32, device=q.device)
    kernels.weighted_dots[(B * H, -(-Lq // 64))](o, do, delta, *_strides(o, do), H, Lq, D=D, BLOCK=64, BLOCK_D=settings["BLOCK_D"])
    mine = config.keys
    by_key = tiles_on(visible.transposed, mine.rows, q.device)
    kernels.backward_keys[(len(by_key.table) * B * H,)](
        q, k, v, do, lse, delta, inv_q, inv_k, log_scale, dk, dv, by_key.table, by_key.lo, by_key.hi, sm_scale,
        *_strides(q, k, v, do, dk, dv), len(by_key.table), H, Lq, Lk, NORM=norm, BLOCK_N=mine.rows, BLOCK_M=mine.inner, STAGES=mine.stages,
        num_warps=mine.warps, **settings,
    )  # fmt: skip
    mine = config.queries
    by_query = tiles_on(visible, mine.rows, q.device)
    parts = torch.empty(B, H, Lq if norm else 0, dtype=torch.float32, device=q.device)
    kernels.backward_queries[(len(by_query.table) * B * H,)](
        q, k, v, do, lse, delta, inv_q, inv_k, log_scale, dq, parts, by_query.table, by_query.lo, by_query.hi, sm_scale,
        *_strides(q, k, v, do, dq), len(by_query.table), H, Lq, Lk, NORM=norm, BLOCK_M=mine.rows, BLOCK_N=mine.inner, STAGES=mine.stages,
        num_warps=mine.warps, **settings,
    )  # fmt: skip
    if log_scale is None:
        return parts.new_zeros(H)
    return torch.where(log_scale.float() < MAX_LOG_SCALE, parts.sum((0, 2)), 0.0)


def _forward(qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float) -> tuple[Tensor, ...]:
    visible = scales_of(tuple(schedule), _pattern(pattern))
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    return launch_forward(*_split(qkv), log_scale, visible, sm_scale)


def _backward(
    do: Tensor, qkv: Tensor, log_scale: Tensor | None, o: Tensor, lse: Tensor, inv_q: Tensor, inv_k: Tensor, schedule: list[int],
    pattern: str, sm_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    visible = scales_of(tuple(schedule), _pattern(pattern))
    dscale = launch_backward(do, *_split(qkv), o, lse, inv_q, inv_k, log_scale, visible, sm_scale, *_split(dqkv))
    return dqkv, dscale.to(log_scale.dtype) if log_scale is not None else dscale


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, log_scale, ctx.schedule, ctx.pattern, ctx.sm_scale = inputs
    ctx.save_for_backward(qkv, log_scale, *output)
    ctx.set_materialize_grads(False)  # else zeros are written for what is kept beside the output


def _gradients(ctx: Any, do: Tensor, backward: Any) -> tuple[Any, ...]:
    qkv, log_scale, *rest = ctx.saved_tensors
    dqkv, dscale = backward(do, qkv, log_scale, *rest, ctx.schedule, ctx.pattern, ctx.sm_scale)
    return dqkv, dscale if log_scale is not None else None, None, None, None


def _eager_backward(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, do, _backward)


_eager = eager(_forward, _save, _eager_backward)


@torch.library.custom_op("var_kernels::attention", mutates_args=(), device_types="cuda")
def attention_op(
    qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`block_attention` as torch.compile sees it; `schedule`: tokens of each scale."""
    return _forward(qkv, log_scale, schedule, pattern, sm_scale)  # type: ignore[return-value]


@attention_op.register_kernel("cpu")
def _(qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, _, H, _ = qkv.shape
    o = reference.attention(*_split(qkv), scales_of(tuple(schedule), _pattern(pattern)), log_scale, sm_scale).contiguous()
    empty = torch.zeros(B, H, L, dtype=torch.float32)  # the CPU backward takes nothing from them
    norms = torch.zeros(B, H, L if log_scale is not None else 0, dtype=torch.float32)
    return o, empty, norms, norms.clone()


@attention_op.register_fake
def _(qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, _, H, D = qkv.shape
    norms = qkv.new_empty(B, H, L if log_scale is not None else 0, dtype=torch.float32)
    return qkv.new_empty(B, L, H, D), qkv.new_empty(B, H, L, dtype=torch.float32), norms, torch.empty_like(norms)


@torch.library.custom_op("var_kernels::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward_op(
    do: Tensor, qkv: Tensor, log_scale: Tensor | None, o: Tensor, lse: Tensor, inv_q: Tensor, inv_k: Tensor, schedule: list[int],
    pattern: str, sm_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Its backward, as torch.compile sees it."""
    return _backward(do, qkv, log_scale, o, lse, inv_q, inv_k, schedule, pattern, sm_scale)


@attention_backward_op.register_kernel("cpu")
def _(
    do: Tensor, qkv: Tensor, log_scale: Tensor | None, o: Tensor, lse: Tensor, inv_q: Tensor, inv_k: Tensor, schedule: list[int],
    pattern: str, sm_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    visible = scales_of(tuple(schedule), _pattern(pattern))
    dqkv, dscale = reference.backward(do, *_split(qkv), visible, log_scale, sm_scale)
    return dqkv, dscale if log_scale is not None else qkv.new_zeros(qkv.shape[3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(
    do: Tensor, qkv: Tensor, log_scale: Tensor | None, o: Tensor, lse: Tensor, inv_q: Tensor, inv_k: Tensor, schedule: list[int],
    pattern: str, sm_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dscale = qkv.new_empty(qkv.shape[3], dtype=torch.float32) if log_scale is None else log_scale.new_empty(log_scale.shape)
    return qkv.new_empty(qkv.shape), dscale


def _backward_through_op(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, do, attention_backward_op)


attention_op.register_autograd(_backward_through_op, setup_context=_save)
