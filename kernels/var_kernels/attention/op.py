"""The public functions: block_attention for training (packed q, k, v, differentiable), and
append_to_cache and cached_attention for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from var_kernels.attention import reference
from var_kernels.attention.launch import launch_append, launch_backward, launch_forward, split
from var_kernels.attention.schedule import Pattern, counts, everything, scales_of
from var_kernels.dispatch import eager, require, use_triton


def block_attention(
    qkv_BL3HD: Tensor,
    patch_nums: Sequence[int | tuple[int, int]],
    log_scale_H: Tensor | None = None,
    sm_scale: float = 1.0,
    pattern: Pattern = "full",
) -> Tensor:
    """Attention of all tokens of a scale schedule, each over the scales that `pattern` shows it.

    Args:
        qkv_BL3HD: the packed projection, read without a copy. On GPUs a head has at most 128
            channels in half precision, and 64 in float32.
        patch_nums: the side of each scale's grid, or (height, width).
        log_scale_H: one number per head, in any shape: the reference's attn_l2_norm,
            q <- q/|q| exp(min(s, ln 100)) and k <- k/|k|, without another scale.
        sm_scale: the factor of q k^T without `log_scale_H`.
        pattern: full, own, or a number of scales; see schedule.py.

    Returns:
        (B, L, H D).

    Raises:
        ValueError: L is not the length of the schedule, the pattern is unknown, or there is not
            one scale per head.
    """
    for side in patch_nums:
        fits = isinstance(side, int) or len(side) == 2
        require(
            fits and min((side,) if isinstance(side, int) else side) > 0,
            "attention: patch_nums {} are not grid sides",
            patch_nums,
        )
    schedule = counts(patch_nums)
    require(
        qkv_BL3HD.ndim == 5 and qkv_BL3HD.shape[2] == 3,
        "attention: qkv is (B, L, 3, H, D), not {}",
        qkv_BL3HD.shape,
    )
    B, L, _, H, D = qkv_BL3HD.shape
    require(
        sum(schedule) == L,
        "attention: qkv {} does not hold the tokens of patch_nums {}",
        qkv_BL3HD.shape,
        patch_nums,
    )
    if log_scale_H is not None:
        require(
            log_scale_H.numel() == H, "attention: {} scales for {} heads", log_scale_H.numel(), H
        )
        log_scale_H = log_scale_H.reshape(H)
    arguments = (qkv_BL3HD, log_scale_H, list(schedule), str(pattern), float(sm_scale))
    if torch.compiler.is_compiling():
        return attention_op(*arguments)[0].reshape(B, L, H * D)
    if not use_triton(qkv_BL3HD):
        return reference.attention(
            *split(qkv_BL3HD), scales_of(schedule, pattern), log_scale_H, sm_scale
        ).reshape(B, L, H * D)
    return _eager(*arguments)[0].reshape(B, L, H * D)


def cached_attention(
    q_BlHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, sm_scale: float = 1.0
) -> Tensor:
    """Queries of the scale that is being sampled over all keys so far, which are views of a cache.

    Returns (B, l, H, D); has no gradient. If the model normalises q and k, they are normalised
    already: the cache holds normalised keys.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_BlHD, k_BLHD, v_BLHD)):
        raise RuntimeError(
            "cached_attention has no gradient; call it under torch.no_grad(), or use "
            "block_attention"
        )
    q, k, v = q_BlHD.shape, k_BLHD.shape, v_BLHD.shape
    fit = len(q) == 4 and k == v and q[::2] == k[::2] and q[3] == k[3]
    require(
        fit,
        "cached_attention: q (B, l, H, D) and k, v (B, L, H, D) are needed, not {}, {}, {}",
        q,
        k,
        v,
    )
    visible = everything(q_BlHD.shape[1], k_BLHD.shape[1])
    if not use_triton(q_BlHD):
        return reference.attention(q_BlHD, k_BLHD, v_BLHD, visible, None, sm_scale)
    return launch_forward(q_BlHD, k_BLHD, v_BLHD, None, visible, sm_scale)[0]


def append_to_cache(
    qkv_Bl3HD: Tensor, cache_2BHLD: Tensor, start: int, log_scale_H: Tensor | None = None
) -> Tensor:
    """Put the keys and values of the scale that is being sampled, packed (B, l, 3, H, D), into the
    cache (2, B, H, L, D) at the places from `start` on, and return its queries (B, l, H, D).

    With `log_scale_H` they are q/|q| exp(min(s, ln 100)) and k/|k|, the reference's attn_l2_norm.
    Has no gradient.

    Raises:
        ValueError: the cache has no room.
    """
    B, l, three, H, D = qkv_Bl3HD.shape
    room = (
        cache_2BHLD.shape[:3] == (2, B, H)
        and cache_2BHLD.shape[4] == D
        and start + l <= cache_2BHLD.shape[3]
        and three == 3
    )
    require(
        room,
        "append_to_cache: {} from place {} does not fit into a cache {}",
        qkv_Bl3HD.shape,
        start,
        cache_2BHLD.shape,
    )
    if torch.is_grad_enabled() and qkv_Bl3HD.requires_grad:
        raise RuntimeError("append_to_cache has no gradient; call it under torch.no_grad()")
    if not use_triton(qkv_Bl3HD):
        q, k, v = reference.normalised(*split(qkv_Bl3HD), log_scale_H)
        cache_2BHLD[0, :, :, start : start + l] = k.transpose(1, 2)
        cache_2BHLD[1, :, :, start : start + l] = v.transpose(1, 2)
        return q
    return launch_append(qkv_Bl3HD, cache_2BHLD, start, log_scale_H)


def _pattern(text: str) -> Pattern:
    return int(text) if text.isdigit() else text


def _forward(
    qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float
) -> tuple[Tensor, ...]:
    visible = scales_of(tuple(schedule), _pattern(pattern))
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    return launch_forward(*split(qkv), log_scale, visible, sm_scale)


def _backward(
    do: Tensor,
    qkv: Tensor,
    log_scale: Tensor | None,
    o: Tensor,
    lse: Tensor,
    inv_q: Tensor,
    inv_k: Tensor,
    schedule: list[int],
    pattern: str,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    visible = scales_of(tuple(schedule), _pattern(pattern))
    dscale = launch_backward(
        do, *split(qkv), o, lse, inv_q, inv_k, log_scale, visible, sm_scale, *split(dqkv)
    )
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
def _(
    qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, _, H, _ = qkv.shape
    o = reference.attention(
        *split(qkv), scales_of(tuple(schedule), _pattern(pattern)), log_scale, sm_scale
    ).contiguous()
    empty = torch.zeros(B, H, L, dtype=torch.float32)  # the CPU backward takes nothing from them
    norms = torch.zeros(B, H, L if log_scale is not None else 0, dtype=torch.float32)
    return o, empty, norms, norms.clone()


@attention_op.register_fake
def _(
    qkv: Tensor, log_scale: Tensor | None, schedule: list[int], pattern: str, sm_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, _, H, D = qkv.shape
    norms = qkv.new_empty(B, H, L if log_scale is not None else 0, dtype=torch.float32)
    return (
        qkv.new_empty(B, L, H, D),
        qkv.new_empty(B, H, L, dtype=torch.float32),
        norms,
        torch.empty_like(norms),
    )


@torch.library.custom_op("var_kernels::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward_op(
    do: Tensor,
    qkv: Tensor,
    log_scale: Tensor | None,
    o: Tensor,
    lse: Tensor,
    inv_q: Tensor,
    inv_k: Tensor,
    schedule: list[int],
    pattern: str,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """Its backward, as torch.compile sees it."""
    return _backward(do, qkv, log_scale, o, lse, inv_q, inv_k, schedule, pattern, sm_scale)


@attention_backward_op.register_kernel("cpu")
def _(
    do: Tensor,
    qkv: Tensor,
    log_scale: Tensor | None,
    o: Tensor,
    lse: Tensor,
    inv_q: Tensor,
    inv_k: Tensor,
    schedule: list[int],
    pattern: str,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    visible = scales_of(tuple(schedule), _pattern(pattern))
    dqkv, dscale = reference.backward(do, *split(qkv), visible, log_scale, sm_scale)
    return dqkv, dscale if log_scale is not None else qkv.new_zeros(
        qkv.shape[3], dtype=torch.float32
    )


@attention_backward_op.register_fake
def _(
    do: Tensor,
    qkv: Tensor,
    log_scale: Tensor | None,
    o: Tensor,
    lse: Tensor,
    inv_q: Tensor,
    inv_k: Tensor,
    schedule: list[int],
    pattern: str,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    dscale = (
        qkv.new_empty(qkv.shape[3], dtype=torch.float32)
        if log_scale is None
        else log_scale.new_empty(log_scale.shape)
    )
    return qkv.new_empty(qkv.shape), dscale


def _backward_through_op(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, do, attention_backward_op)


attention_op.register_autograd(_backward_through_op, setup_context=_save)
