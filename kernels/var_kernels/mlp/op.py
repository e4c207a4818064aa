"""The public function: the whole MLP in one operator, so that it decides what is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels.dispatch import compute_dtype, multiprocessors, use_triton
from var_kernels.mlp import config, reference

SAVE = ("preact", "both", "input")


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str = "preact") -> Tensor:
    """gelu(x W1^T + b1) W2^T + b2, x (..., C), w1 (F, C), w2 (C, F), in autocast's type, else that of x.

    `save` says what is kept for the backward pass beside x: "preact", h = x W1^T + b1 (2 F bytes a token in bf16; a = gelu(h) is made again
    in the kernel that needs h anyway); "both", h and a; "input", nothing (one more matrix product).
    """
    if save not in SAVE:
        raise ValueError(f"gelu_mlp: save={save!r} is not known; take one of {', '.join(SAVE)}")
    if not (torch.compiler.is_compiling() or use_triton(x)):
        return reference.mlp(x, w1, b1, w2, b2)
    arguments = (x.to(compute_dtype(x)), w1, b1, w2, b2, save)
    return mlp_op(*arguments)[0] if torch.compiler.is_compiling() else _Function.apply(*arguments)[0]


def gelu(h: Tensor) -> Tensor:
    """The Triton GELU."""
    from var_kernels.mlp import triton as kernels

    a = torch.empty_like(h)
    kernels.gelu[(-(-h.numel() // config.FORWARD_BLOCK),)](h, a, h.numel(), BLOCK=config.FORWARD_BLOCK, num_warps=config.FORWARD_WARPS)
    return a


def gelu_backward(da: Tensor, h: Tensor, want_a: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, a or nothing, column sums of dh (F,) float32) of (rows, F) matrices."""
    from var_kernels.mlp import triton as kernels

    rows, hidden = h.shape
    dh, a = torch.empty_like(h), torch.empty_like(h) if want_a else h.new_empty(0)
    groups = config.row_blocks(rows, hidden, multiprocessors(h.device))
    partial = torch.empty(groups, hidden, dtype=torch.float32, device=h.device)
    kernels.gelu_backward[(-(-hidden // config.COLUMNS), groups)](
        da.contiguous(), h, dh, a, partial, rows, -(-rows // groups), hidden, WRITE_A=want_a, BLOCK=config.COLUMNS,
        STAGES=config.BACKWARD_STAGES, num_warps=config.BACKWARD_WARPS,
    )  # fmt: skip
    return dh, a, partial.sum(0)


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, a); h and a are empty unless they are kept."""
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
    from var_kernels.dispatch import INTERPRETED

    return h.is_cuda or INTERPRETED


def _backward(dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1, w2, b2."""
    with torch.autocast(x.device.type, enabled=False):
        rows, dy_NC = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        if h.numel() == 0:
            h = F.linear(x, w1.to(x.dtype), b1.to(x.dtype))
        h = h.reshape(-1, h.shape[-1])
        dh, again, db1 = _gelu_backward(dy_NC @ w2.to(x.dtype), h, want_a=a.numel() == 0)
        kept = again if a.numel() == 0 else a.reshape(h.shape)
        dw2, dw1, dx = dy_NC.t() @ kept, dh.t() @ rows, dh @ w1.to(x.dtype)
        db2 = dy_NC.sum(0, dtype=torch.float32)
    return dx.view(x.shape), dw1.to(w1.dtype), db1.to(b1.dtype), dw2.to(w2.dtype), db2.to(b1.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, _, _ = inputs
    ctx.save_for_backward(x, w1, b1, w2, output[1], output[2])


class _Function(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return *_backward(dy, *ctx.saved_tensors), None


@torch.library.custom_op("var_kernels::mlp", mutates_args=())
def mlp_op(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu_mlp` as torch.compile sees it: (y, h, a), the last two empty unless `save` keeps them."""
    return _forward(x, w1, b1, w2, b2, save)


@mlp_op.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (*x.shape[:-1], w1.shape[0])
    y = x.new_empty((*x.shape[:-1], w2.shape[0]))
    return y, x.new_empty((0,) if save == "input" else hidden), x.new_empty(hidden if save == "both" else (0,))


@torch.library.custom_op("var_kernels::mlp_backward", mutates_args=())
def mlp_backward_op(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Its backward, as torch.compile sees it."""
    return _backward(dy, x, w1, b1, w2, h, a)  # type: ignore[return-value]


@mlp_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, h: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), w1.new_empty(w1.shape), b1.new_empty(b1.shape), w2.new_empty(w2.shape), b1.new_empty(w2.shape[0])


def _backward_through_op(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return *mlp_backward_op(dy, *ctx.saved_tensors), None


mlp_op.register_autograd(_backward_through_op, setup_context=_save)
