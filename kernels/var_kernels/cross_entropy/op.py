"""The public function: the output projection and its cross-entropy in one operator.

The operator is differentiable and opaque to torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels.cross_entropy import reference
from var_kernels.cross_entropy.config import MAX_V, MOST_LOGITS, SCALE_BLOCK, warps_for
from var_kernels.dispatch import INTERPRETED, compute_dtype, eager, launches, require, use_triton
from var_kernels.numerics import upcast


def linear_cross_entropy(
    x_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logits = x W^T + b and their cross-entropy.

    Returns the loss (N,), the cross-entropy alone (N,), and the most likely code (N,). The loss is
    the cross-entropy with label smoothing plus `z_loss` times the squared log-sum-exp. Only the
    loss has a gradient.

    The logits are computed in the data type of autocast, or else that of x. The forward pass
    overwrites them with their gradient, up to the factor of each row: nothing else of size N V is
    kept, and nothing waits for the GPU.

    `target_N` is int64 in 0..V-1. On a GPU, the loss of any other target is NaN.

    Raises ValueError for shapes that do not fit, for V above 16384, and for smoothing outside
    [0, 1).
    """
    V = weight_VC.shape[0]
    require(V <= MAX_V, "linear_cross_entropy: a vocabulary of {} is larger than {}", V, MAX_V)
    fit = (
        x_NC.ndim == weight_VC.ndim == 2
        and x_NC.shape[1] == weight_VC.shape[1]
        and (bias_V is None or bias_V.shape == (V,))
    )
    shapes = x_NC.shape, weight_VC.shape, None if bias_V is None else bias_V.shape
    require(
        fit,
        "linear_cross_entropy: x (N, C), weight (V, C) and bias (V,) are needed, not {}, {}, {}",
        *shapes,
    )
    fit = target_N.shape == x_NC.shape[:1] and target_N.dtype == torch.int64
    require(
        fit,
        "linear_cross_entropy: target ({},) int64 is needed, not {} {}",
        x_NC.shape[0],
        target_N.shape,
        target_N.dtype,
    )
    require(
        0 <= smoothing < 1, "linear_cross_entropy: label smoothing {} is outside [0, 1)", smoothing
    )
    if not (torch.compiler.is_compiling() or use_triton(x_NC)):
        dtype = compute_dtype(x_NC)
        bias = None if bias_V is None else bias_V.to(dtype)
        return reference.cross_entropy(
            F.linear(x_NC.to(dtype), weight_VC.to(dtype), bias), target_N, smoothing, z_loss
        )
    gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_NC, weight_VC, bias_V)
    )
    arguments = (
        x_NC.to(compute_dtype(x_NC)),
        weight_VC,
        bias_V,
        target_N,
        float(smoothing),
        float(z_loss),
        gradient,
    )
    loss, ce, best, _ = (
        linear_ce_op(*arguments) if torch.compiler.is_compiling() else _eager(*arguments)
    )
    return loss, ce, best


@launches
def launch(
    logits: Tensor, target: Tensor, smoothing: float, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the Triton kernel on logits (N, V).

    Returns the loss, the cross-entropy and the most likely code, each (N,). If `gradient` is set,
    the kernel overwrites the logits with their gradient.
    """
    from var_kernels.cross_entropy import triton as kernels

    N, V = logits.shape
    loss, ce = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    best = torch.empty(N, dtype=torch.int64, device=logits.device)
    block = 1 << (V - 1).bit_length()
    kernels.cross_entropy[(N,)](
        logits=logits,
        target=target.contiguous(),
        loss=loss,
        ce=ce,
        best=best,
        V=V,
        row_stride=logits.stride(0),
        smoothing=smoothing,
        z_loss=z_loss,
        SMOOTH=smoothing != 0,
        GRADIENT=gradient,
        BLOCK_V=block,
        num_warps=warps_for(block),
    )
    return loss, ce, best


@launches
def scale_rows(x: Tensor, factor: Tensor, in_place: bool = False) -> Tensor:
    """Return x (N, C) factor (N,) in the type of x, computed in one pass."""
    if (x.device.type == "cpu" and not INTERPRETED) or x.dtype == torch.float64 or x.numel() == 0:
        return (x * factor[:, None]).to(x.dtype)
    from var_kernels.cross_entropy import triton as kernels

    x = x if x.stride(1) == 1 else x.contiguous()
    N, C = x.shape
    out = x if in_place and x.is_contiguous() else torch.empty(N, C, dtype=x.dtype, device=x.device)
    block = min(SCALE_BLOCK, 1 << (C - 1).bit_length())
    kernels.scale_rows[(N, -(-C // block))](
        x=x,
        factor=factor.contiguous(),
        out=out,
        C=C,
        x_stride=x.stride(0),
        BLOCK_C=block,
        num_warps=4,
    )
    return out


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: float,
    z_loss: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if gradient:
        logits = _logits(x, weight, bias)
        return *launch(logits, target, smoothing, z_loss, gradient), logits
    # The logits are not kept, so a part of them at a time is enough.
    rows = max(1, MOST_LOGITS // weight.shape[0])
    parts = [
        launch(_logits(x_nC, weight, bias), target_n, smoothing, z_loss, gradient)
        for x_nC, target_n in zip(x.split(rows), target.split(rows), strict=True)
    ]
    loss, ce, best = (torch.cat(column) for column in zip(*parts, strict=True))
    return loss, ce, best, x.new_empty(0)


def _backward(
    dloss: Tensor, x: Tensor, weight: Tensor, dlogits: Tensor, needs: Sequence[bool] = (True,) * 3
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias from the gradient of the loss of each row.

    A gradient that is not needed is None. The factors of the rows multiply x and the product, never
    the N V numbers. They are divided by the largest factor, so that 1 / N does not underflow in
    float16.
    """
    with torch.autocast(x.device.type, enabled=False):
        largest = dloss.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        factor = dloss / largest
        dx = scale_rows(dlogits @ weight.to(x.dtype), dloss, in_place=True) if needs[0] else None
        dweight = (
            ((dlogits.t() @ scale_rows(x, factor)).float() * largest).to(weight.dtype)
            if needs[1]
            else None
        )
        dbias = (
            (dlogits.t() @ factor.to(x.dtype)[:, None]).float().squeeze(1) * largest
            if needs[2]
            else None
        )
    return dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(x, weight, output[3])
    # Otherwise autograd writes zeros for what is kept in addition to the output.
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dloss: Tensor, backward: Any) -> tuple[Any, ...]:
    dx, dweight, dbias = backward(dloss, *ctx.saved_tensors)
    return (
        dx,
        dweight,
        None if ctx.bias_dtype is None or dbias is None else dbias.to(ctx.bias_dtype),
        None,
        None,
        None,
        None,
    )


def _eager_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dloss, functools.partial(_backward, needs=ctx.needs_input_grad))


_eager = eager(_forward, _save, _eager_backward)


@torch.library.custom_op("var_kernels::linear_cross_entropy", mutates_args=(), device_types="cuda")
def linear_ce_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: float,
    z_loss: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `linear_cross_entropy` as one operator for torch.compile.

    The last output is d loss / d logits. It is empty without `gradient`.
    """
    return _forward(x, weight, bias, target, smoothing, z_loss, gradient)


@linear_ce_op.register_kernel("cpu")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: float,
    z_loss: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _logits(x, weight, bias)
    loss, ce, best = reference.cross_entropy(logits, target, smoothing, z_loss)
    if not gradient:
        return loss.float(), ce.clone().float(), best, logits.new_empty(0)
    z_NV = upcast(logits)
    dlogits = (
        z_NV.softmax(-1) * (1 + 2 * z_loss * z_NV.logsumexp(-1, keepdim=True))
        - smoothing / logits.shape[1]
    )
    dlogits.scatter_add_(
        1, target[:, None], torch.full_like(dlogits[:, :1], smoothing - 1.0).expand(-1, 1)
    )
    return loss.float(), ce.clone().float(), best, dlogits.to(logits.dtype)


@linear_ce_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: float,
    z_loss: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, V = x.shape[0], weight.shape[0]
    loss = x.new_empty(N, dtype=torch.float32)
    return (
        loss,
        torch.empty_like(loss),
        x.new_empty(N, dtype=torch.int64),
        x.new_empty((N, V) if gradient else (0,)),
    )


@torch.library.custom_op("var_kernels::linear_cross_entropy_backward", mutates_args=())
def linear_ce_backward_op(
    dloss: Tensor, x: Tensor, weight: Tensor, dlogits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward pass of `linear_ce_op`.

    It consists of two matrix products, which are the same on every device.
    """
    return _backward(dloss, x, weight, dlogits)  # type: ignore[return-value]


@linear_ce_backward_op.register_fake
def _(dloss: Tensor, x: Tensor, weight: Tensor, dlogits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(weight.shape[0], dtype=torch.float32),
    )


def _backward_through_op(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dloss, linear_ce_backward_op)


linear_ce_op.register_autograd(_backward_through_op, setup_context=_save)
