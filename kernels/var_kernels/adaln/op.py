"""The public functions: the adaptive layer norm, alone and after a gated residual.

They are differentiable and opaque to torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from var_kernels.adaln import reference
from var_kernels.adaln.config import MAX_C
from var_kernels.adaln.launch import launch_backward, launch_forward
from var_kernels.dispatch import eager, require, use_triton
from var_kernels.numerics import upcast


def gate_adaptive_layer_norm(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gamma_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    keep_B: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute x' = x + keep gamma y and h = LN(x') (1 + scale) + shift; return (x', h).

    x and y are (B, L, C). gamma, scale and shift are (B, C) or (B, 1, C), and they may be views
    with any stride between samples. keep_B (drop-path) is 0 or 1 / (1 - rate) for each sample. x'
    has the dtype of x, so that a float32 residual stream stays float32. h has `out_dtype`, by
    default that of y. The computation is in float32. The source is the reference block: x = x +
    drop_path(f(x) * gamma), ln_wo_grad(x).mul(scale + 1).add(shift).
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
    x_BLC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return LN(x) (1 + scale) + shift, (B, L, C).

    This is `gate_adaptive_layer_norm` without the residual.
    """
    out = out_dtype or x_BLC.dtype
    scale, shift = _flat(scale_BC), _flat(shift_BC)
    _check(x_BLC, None, None, None, scale, shift)
    if x_BLC.shape[-1] > MAX_C or not (torch.compiler.is_compiling() or use_triton(x_BLC)):
        return reference.adaln(x_BLC, scale, shift, eps, out)
    return _run(x_BLC, None, None, None, scale, shift, eps, out)[1]


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the operator, through the dispatcher only under torch.compile."""
    return adaln_op(*arguments) if torch.compiler.is_compiling() else _eager(*arguments)


def _flat(v: Tensor) -> Tensor:
    """Return v as (B, C) with unit stride within a row, as a view where possible."""
    v = v.squeeze(1) if v.ndim == 3 else v
    return v if v.stride(-1) == 1 else v.contiguous()


def _check(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift: Tensor,
) -> None:
    require(x.ndim == 3, "adaln: x must be (B, L, C), not {}", x.shape)
    B, _, C = x.shape
    for name, v, wanted in (
        ("y", y, x.shape),
        ("gamma", gamma, (B, C)),
        ("scale", scale, (B, C)),
        ("shift", shift, (B, C)),
        ("keep", keep, (B,)),
    ):
        if v is not None:
            require(
                v.shape == wanted,
                "adaln: {} has the shape {}, but {} is needed for x {}",
                name,
                v.shape,
                wanted,
                x.shape,
            )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gamma, keep, scale, shift, _, _ = inputs
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x if y is None else x_new, y, gamma, keep, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    # The head does not use x': no zeros are allocated and read for its gradient.
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dx_new: Tensor | None, dh: Tensor | None, backward: Any
) -> tuple[Any, ...]:
    x_new, y, gamma, keep, scale, mean, rstd = ctx.saved_tensors
    residual = None if y is None else dx_new
    dh = torch.zeros_like(x_new) if dh is None else dh
    dx, dy, dgamma, dscale, dshift = backward(
        dh, residual, x_new, y, gamma, keep, scale, ctx.shift_dtype, mean, rstd
    )
    return (
        dx,
        None if y is None else dy,
        None if y is None else dgamma,
        None,
        dscale,
        dshift,
        None,
        None,
    )


def _eager_backward(ctx: Any, dx_new: Tensor, dh: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dx_new, dh, launch_backward)


_eager = eager(launch_forward, _save, _eager_backward, differentiable=2)


@torch.library.custom_op("var_kernels::adaln", mutates_args=(), device_types="cuda")
def adaln_op(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `launch_forward` as one operator for torch.compile."""
    return launch_forward(x, y, gamma, keep, scale, shift, eps, out)


@adaln_op.register_kernel("cpu")
def _(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_new = (
        x.new_empty(0) if y is None or gamma is None else reference.gate_residual(x, y, gamma, keep)
    )
    v = upcast(x if y is None else x_new)
    var, mean = torch.var_mean(v, -1, correction=0)
    h = reference.adaln(v, scale, shift, eps, out).contiguous()
    return x_new.contiguous(), h, mean.flatten().float(), (var + eps).rsqrt().flatten().float()


@adaln_op.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
    h = torch.empty_like(x, dtype=out, memory_format=torch.contiguous_format)
    x_new = (
        x.new_empty(0) if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    )
    return x_new, h, stats, torch.empty_like(stats)


@torch.library.custom_op("var_kernels::adaln_backward", mutates_args=(), device_types="cuda")
def adaln_backward_op(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `launch_backward` as one operator for torch.compile."""
    return launch_backward(dh, dx_new, x_new, y, gamma, keep, scale, shift_dtype, mean, rstd)


@adaln_backward_op.register_kernel("cpu")
def _(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = (
        x_new.new_empty(0)
        if y is None
        else torch.empty_like(y, memory_format=torch.contiguous_format)
    )
    dgamma = (
        scale.new_empty(0)
        if gamma is None
        else torch.empty_like(gamma, memory_format=torch.contiguous_format)
    )
    dx = torch.empty_like(x_new, memory_format=torch.contiguous_format)
    return (
        dx,
        dy,
        dgamma,
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape, dtype=shift_dtype),
    )


def _backward_op(ctx: Any, dx_new: Tensor | None, dh: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dx_new, dh, adaln_backward_op)


adaln_op.register_autograd(_backward_op, setup_context=_save)
