"""The public function of the MLP.

The whole MLP is one operator, so that the operator decides what is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels import dispatch
from var_kernels.dispatch import (
    compute_dtype,
    eager,
    launches,
    multiprocessors,
    require,
    use_triton,
)
from var_kernels.mlp import config, reference

SAVE = ("preact", "both", "input")


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str = "preact"
) -> Tensor:
    """Return gelu(x W1^T + b1) W2^T + b2 for x (..., C), w1 (F, C), w2 (C, F).

    The computation uses the data type of autocast, or else that of x.

    `save` states what is kept for the backward pass in addition to x:

    - "preact" keeps h = x W1^T + b1, which takes 2 F bytes per token in bf16. The backward pass
      recomputes a = gelu(h) in the kernel that needs h anyway.
    - "both" keeps h and a.
    - "input" keeps nothing, which costs one more matrix product.
    """
    if save not in SAVE:
        raise ValueError(f"gelu_mlp: save={save!r} is not known; use one of {', '.join(SAVE)}")
    fit = (
        b1.ndim == b2.ndim == 1
        and w1.shape == (b1.numel(), x.shape[-1])
        and w2.shape == (b2.numel(), b1.numel())
    )
    shapes = x.shape, w1.shape, b1.shape, w2.shape, b2.shape
    require(
        fit,
        "gelu_mlp: w1 (F, C), b1 (F,), w2 (O, F), b2 (O,) are needed for x {}, not {}, {}, {}, {}",
        *shapes,
    )
    dtype = compute_dtype(x)
    if not (torch.compiler.is_compiling() or use_triton(x)):
        return reference.mlp(x.to(dtype), w1.to(dtype), b1.to(dtype), w2.to(dtype), b2.to(dtype))
    arguments = (x.to(dtype), w1, b1, w2, b2, save)
    return mlp_op(*arguments)[0] if torch.compiler.is_compiling() else _eager(*arguments)[0]


@launches
def gelu(h: Tensor) -> Tensor:
    """Launch the Triton kernel of the GELU."""
    from var_kernels.mlp import triton as kernels

    a = torch.empty_like(h)
    kernels.gelu[(-(-h.numel() // config.FORWARD_BLOCK),)](
        h=h,
        a=a,
        count=h.numel(),
        BLOCK=config.FORWARD_BLOCK,
        num_warps=config.FORWARD_WARPS,
    )
    return a


@launches
def gelu_backward(da: Tensor, h: Tensor, want_a: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh, a, and the column sums of dh (F,) in float32, for (rows, F) matrices.

    a is empty unless `want_a` is set.
    """
    from var_kernels.mlp import triton as kernels

    rows, hidden = h.shape
    dh, a = torch.empty_like(h), torch.empty_like(h) if want_a else h.new_empty(0)
    groups = config.row_blocks(rows, hidden, multiprocessors(h.device))
    partial = torch.empty(groups, hidden, dtype=torch.float32, device=h.device)
    kernels.gelu_backward[(-(-hidden // config.COLUMNS), groups)](
        da=da.contiguous(),
        h=h,
        dh=dh,
        a=a,
        partial=partial,
        rows=rows,
        group=-(-rows // groups),
        hidden=hidden,
        WRITE_A=want_a,
        BLOCK=config.COLUMNS,
        STAGES=config.BACKWARD_STAGES,
        num_warps=config.BACKWARD_WARPS,
    )
    return dh, a, partial.sum(0)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, h, a); h and a are empty unless they are kept."""
    with torch.autocast(x.device.type, enabled=False):
        h = F.linear(x, w1.to(x.dtype), b1.to(x.dtype))
        a = _gelu(h)
        y = F.linear(a, w2.to(x.dtype), b2.to(x.dtype))
    nothing = x.new_empty(0)
    return y, nothing if save == "input" else h, a if save == "both" else nothing.clone()


def _gelu(h: Tensor) -> Tensor:
    return gelu(h) if _kernels(h) else F.gelu(h, approximate="tanh")


def _gelu_backward(da: Tensor, h: Tensor, want_a: bool) -> tuple[Tensor, Tensor, Tensor]:
    if _kernels(h):
        return gelu_backward(da, h, want_a)
    dh = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    return dh, F.gelu(h, approximate="tanh") if want_a else h.new_empty(0), dh.float().sum(0)


def _kernels(h: Tensor) -> bool:
    return h.is_cuda or dispatch.INTERPRETED


def _backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    h: Tensor,
    a: Tensor,
    needs: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w1, b1, w2, b2.

    The gradient is None where its matrix product is not needed (frozen weights).
    """
    with torch.autocast(x.device.type, enabled=False):
        rows, dy_NC = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        if h.numel() == 0:
            h = F.linear(x, w1.to(x.dtype), b1.to(x.dtype))
        h = h.reshape(-1, h.shape[-1])
        dh, again, db1 = _gelu_backward(dy_NC @ w2.to(x.dtype), h, want_a=a.numel() == 0)
        kept = again if a.numel() == 0 else a.reshape(h.shape)
        dx = (dh @ w1.to(x.dtype)).view(x.shape) if needs[0] else None
        dw1 = (dh.t() @ rows).to(w1.dtype) if needs[1] else None
        dw2 = (dy_NC.t() @ kept).to(w2.dtype) if needs[3] else None
        db2 = dy_NC.sum(0, dtype=torch.float32)
    return dx, dw1, db1.to(b1.dtype), dw2, db2.to(b1.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, _, _ = inputs
    ctx.save_for_backward(x, w1, b1, w2, output[1], output[2])
    # Otherwise autograd writes zeros for what is kept in addition to the output.
    ctx.set_materialize_grads(False)


def _eager_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, w1, b1, w2, h, a = ctx.saved_tensors
    return *_backward(dy, x, w1, b1, w2, h, a, ctx.needs_input_grad), None


_eager = eager(_forward, _save, _eager_backward)


@torch.library.custom_op("var_kernels::mlp", mutates_args=())
def mlp_op(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gelu_mlp` as one operator for torch.compile.

    Returns (y, h, a); h and a are empty unless `save` keeps them.
    """
    return _forward(x, w1, b1, w2, b2, save)


@mlp_op.register_fake
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (*x.shape[:-1], w1.shape[0])
    y = x.new_empty((*x.shape[:-1], w2.shape[0]))
    return (
        y,
        x.new_empty((0,) if save == "input" else hidden),
        x.new_empty(hidden if save == "both" else (0,)),
    )


@torch.library.custom_op("var_kernels::mlp_backward", mutates_args=())
def mlp_backward_op(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward pass of `mlp_op` as one operator for torch.compile."""
    return _backward(dy, x, w1, b1, w2, h, a)  # type: ignore[return-value]


@mlp_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        w1.new_empty(w1.shape),
        b1.new_empty(b1.shape),
        w2.new_empty(w2.shape),
        b1.new_empty(w2.shape[0]),
    )


def _backward_through_op(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return *mlp_backward_op(dy, *ctx.saved_tensors), None


mlp_op.register_autograd(_backward_through_op, setup_context=_save)
