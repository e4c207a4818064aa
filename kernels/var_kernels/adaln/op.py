"""The public functions: adaptive layer norm, alone and after a gated residual. Differentiable, and opaque to torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_kernels.adaln import reference
from var_kernels.adaln.config import A_ROW_EACH, MAX_C, config_for, splits
from var_kernels.dispatch import eager, launches, multiprocessors, require, use_triton
from var_kernels.numerics import upcast


def gate_adaptive_layer_norm(
    x_BLC: Tensor, y_BLC: Tensor, gamma_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, keep_B: Tensor | None = None,
    eps: float = 1e-6, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + keep gamma y and h = LN(x') (1 + scale) + shift; returns (x', h).

    x, y (B, L, C). gamma, scale, shift: (B, C) or (B, 1, C), views with any stride between samples. keep_B: 0 or 1 / (1 - rate) a
    sample (drop-path). x' has the dtype of x, so a float32 residual stream stays one; h has `out_dtype`, that of y unless given.
    Source: the reference block, x = x + drop_path(f(x) * gamma), ln_wo_grad(x).mul(scale + 1).add(shift); computed in float32.
    """
    out = out_dtype or y_BLC.dtype
    gamma, scale, shift = _flat(gamma_BC), _flat(scale_BC), _flat(shift_BC)
    _check(x_BLC, y_BLC, gamma, keep_B, scale, shift)
    if x_BLC.shape[-1] > MAX_C or not (torch.compiler.is_compiling() or use_triton(x_BLC)):
        x_new = reference.gate_residual(x_BLC, y_BLC, gamma, keep_B)
        return x_new, reference.adaln(x_new, scale, shift, eps, out)
    x_new, h, _, _ = _run(x_BLC, y_BLC, gamma, keep_B, scale, shift, eps, out)
    return x_new, h


def adaptive_layer_norm(
    x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) (1 + scale) + shift, (B, L, C); as `gate_adaptive_layer_norm` without the residual: for the first block and the head."""
    out = out_dtype or x_BLC.dtype
    scale, shift = _flat(scale_BC), _flat(shift_BC)
    _check(x_BLC, None, None, None, scale, shift)
    if x_BLC.shape[-1] > MAX_C or not (torch.compiler.is_compiling() or use_triton(x_BLC)):
        return reference.adaln(x_BLC, scale, shift, eps, out)
    return _run(x_BLC, None, None, None, scale, shift, eps, out)[1]


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """Through the dispatcher only where a compiler looks."""
    return adaln_op(*arguments) if torch.compiler.is_compiling() else _eager(*arguments)


def _flat(v: Tensor) -> Tensor:
    """(B, C) with unit stride inside a row; a view wherever it can be."""
    v = v.squeeze(1) if v.ndim == 3 else v
    return v if v.stride(-1) == 1 else v.contiguous()


@launches
def launch_forward(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton forward: (x', h, mean (B L,), rstd (B L,)); x' is empty without a gate."""
    from var_kernels.adaln import triton as kernels

    B, L, C = x.shape
    x, y, keep = x.contiguous(), None if y is None else y.contiguous(), None if keep is None else keep.contiguous()
    h = torch.empty_like(x, dtype=out)
    x_new = x.new_empty(0) if y is None else torch.empty_like(x)
    mean, rstd = (torch.empty(B * L, dtype=torch.float32, device=x.device) for _ in range(2))
    settings = config_for(C, x.element_size())
    mine = settings.forward if y is None else settings.gated
    parts = splits(B, L, mine.programs * multiprocessors(x.device))
    kernels.forward[(parts, B)](
        x, y, gamma, keep, scale, shift, x_new, h, mean, rstd, L, C, -(-L // parts), 0 if gamma is None else gamma.stride(0),
        scale.stride(0), shift.stride(0), eps, GATED=y is not None, KEEP=keep is not None,
        A_ROW_EACH=mine.programs == A_ROW_EACH, BLOCK_C=settings.block_c, STAGES=mine.stages, num_warps=mine.warps,
    )  # fmt: skip
    return x_new, h, mean, rstd


@launches
def launch_backward(
    dh: Tensor, dx_new: Tensor | None, x_new: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor,
    shift_dtype: torch.dtype, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The Triton backward: gradients of x, y, gamma, scale, shift; those of y and gamma are empty without a gate."""
    from var_kernels.adaln import triton as kernels

    B, L, C = x_new.shape
    gated = y is not None and gamma is not None
    dh, x_new = dh.contiguous(), x_new.contiguous()
    dx_new = None if dx_new is None else dx_new.contiguous()
    y, keep = None if y is None else y.contiguous(), None if keep is None else keep.contiguous()
    dx, dy = torch.empty_like(x_new), torch.empty_like(y) if y is not None else x_new.new_empty(0)
    settings = config_for(C, x_new.element_size())
    mine = settings.backward
    parts = splits(B, L, mine.programs * multiprocessors(x_new.device))
    partial = torch.empty(B, parts, 3, C, dtype=torch.float32, device=x_new.device)
    kernels.backward[(parts, B)](
        dh, dx_new, x_new, y, gamma, keep, scale, mean, rstd, dx, dy, partial, L, C, -(-L // parts),
        0 if gamma is None else gamma.stride(0), scale.stride(0), GATED=gated, KEEP=keep is not None, RESIDUAL=dx_new is not None,
        BLOCK_C=settings.block_c, STAGES=mine.stages, num_warps=mine.warps,
    )  # fmt: skip
    dscale = torch.empty(B, C, dtype=scale.dtype, device=scale.device)
    dshift = torch.empty(B, C, dtype=shift_dtype, device=scale.device)
    dgamma = torch.empty(B, C, dtype=gamma.dtype, device=scale.device) if gamma is not None else scale.new_empty(0)
    block = min(256, settings.block_c)
    kernels.finish[(-(-C // block), B)](partial, dscale, dshift, dgamma, C, parts, GATED=gated, BLOCK=block, num_warps=4)
    return dx, dy, dgamma, dscale, dshift


def _check(x: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor, shift: Tensor) -> None:
    require(x.ndim == 3, "adaln: x is (B, L, C), not {}", x.shape)
    B, _, C = x.shape
    for name, v, wanted in (("y", y, x.shape), ("gamma", gamma, (B, C)), ("scale", scale, (B, C)), ("shift", shift, (B, C)),
                            ("keep", keep, (B,))):  # fmt: skip
        if v is not None:
            require(v.shape == wanted, "adaln: {} has the shape {}, {} is needed for x {}", name, v.shape, wanted, x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gamma, keep, scale, shift, _, _ = inputs
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x if y is None else x_new, y, gamma, keep, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)  # in the head x' is not used: no zeros are made and read for it


def _gradients(ctx: Any, dx_new: Tensor | None, dh: Tensor | None, backward: Any) -> tuple[Any, ...]:
    x_new, y, gamma, keep, scale, mean, rstd = ctx.saved_tensors
    residual = None if y is None else dx_new
    dh = torch.zeros_like(x_new) if dh is None else dh
    dx, dy, dgamma, dscale, dshift = backward(dh, residual, x_new, y, gamma, keep, scale, ctx.shift_dtype, mean, rstd)
    return dx, None if y is None else dy, None if y is None else dgamma, None, dscale, dshift, None, None


def _eager_backward(ctx: Any, dx_new: Tensor, dh: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dx_new, dh, launch_backward)


_eager = eager(launch_forward, _save, _eager_backward, differentiable=2)


@torch.library.custom_op("var_kernels::adaln", mutates_args=(), device_types="cuda")
def adaln_op(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch_forward` as torch.compile sees it."""
    return launch_forward(x, y, gamma, keep, scale, shift, eps, out)


@adaln_op.register_kernel("cpu")
def _(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_new = x.new_empty(0) if y is None or gamma is None else reference.gate_residual(x, y, gamma, keep)
    v = upcast(x if y is None else x_new)
    var, mean = torch.var_mean(v, -1, correction=0)
    h = reference.adaln(v, scale, shift, eps, out).contiguous()
    return x_new.contiguous(), h, mean.flatten().float(), (var + eps).rsqrt().flatten().float()


@adaln_op.register_fake
def _(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
    h = torch.empty_like(x, dtype=out, memory_format=torch.contiguous_format)
    x_new = x.new_empty(0) if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_new, h, stats, torch.empty_like(stats)


@torch.library.custom_op("var_kernels::adaln_backward", mutates_args=(), device_types="cuda")
def adaln_backward_op(
    dh: Tensor, dx_new: Tensor | None, x_new: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor,
    shift_dtype: torch.dtype, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch_backward` as torch.compile sees it."""
    return launch_backward(dh, dx_new, x_new, y, gamma, keep, scale, shift_dtype, mean, rstd)


@adaln_backward_op.register_kernel("cpu")
def _(
    dh: Tensor, dx_new: Tensor | None, x_new: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor,
    shift_dtype: torch.dtype, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, L, _ = x_new.shape
    inverse = rstd.view(B, L, 1).to(upcast(x_new).dtype)
    normal = (upcast(x_new) - mean.view(B, L, 1)) * inverse
    g = upcast(dh)
    dscale, dshift = (g * normal).sum(1), g.sum(1)
    g = g * (1 + reference.row(scale))
    d = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * inverse
    d = d if dx_new is None else d + upcast(dx_new)
    dy, dgamma = x_new.new_empty(0), scale.new_empty(0)
    if y is not None and gamma is not None:
        survive = 1.0 if keep is None else upcast(keep).view(-1, 1, 1)
        dy = (d * reference.row(gamma) * survive).to(y.dtype)
        dgamma = (d * upcast(y) * survive).sum(1).to(gamma.dtype)
    return d.to(x_new.dtype), dy, dgamma, dscale.to(scale.dtype), dshift.to(shift_dtype)


@adaln_backward_op.register_fake
def _(
    dh: Tensor, dx_new: Tensor | None, x_new: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, scale: Tensor,
    shift_dtype: torch.dtype, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy = x_new.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    dgamma = scale.new_empty(0) if gamma is None else torch.empty_like(gamma, memory_format=torch.contiguous_format)
    dx = torch.empty_like(x_new, memory_format=torch.contiguous_format)
    return dx, dy, dgamma, scale.new_empty(scale.shape), scale.new_empty(scale.shape, dtype=shift_dtype)


def _backward_op(ctx: Any, dx_new: Tensor | None, dh: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dx_new, dh, adaln_backward_op)


adaln_op.register_autograd(_backward_op, setup_context=_save)
