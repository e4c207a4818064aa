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
    INTERPRETED,
    compute_dtype,
    eager,
    generation,
    launches,
    multiprocessors,
    precision,
    require,
    use_triton,
)
from var_kernels.mlp import config, reference
from var_kernels.mlp.tune import choice

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
        h, a, h.numel(), BLOCK=config.FORWARD_BLOCK, num_warps=config.FORWARD_WARPS
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
        da.contiguous(),
        h,
        dh,
        a,
        partial,
        rows,
        -(-rows // groups),
        hidden,
        WRITE_A=want_a,
        BLOCK=config.COLUMNS,
        STAGES=config.BACKWARD_STAGES,
        num_warps=config.BACKWARD_WARPS,
    )
    return dh, a, partial.sum(0)


def _product_arguments(
    x: Tensor, w: Tensor, w_by_row: bool
) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Return x and w in the form that a kernel takes, and the settings of the kernel."""
    settings = config.product_config(generation(x.device), backward=not w_by_row)
    tiles = {"BLOCK_M": settings.block_m, "BLOCK_N": settings.block_n, "BLOCK_K": settings.block_k}
    # The hardware requires this alignment for tensor descriptors.
    aligned = all(
        t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, w)
    )
    operands: tuple[Any, Any] = (x, w)
    if settings.descriptor and aligned:
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = (
            [settings.block_n, settings.block_k]
            if w_by_row
            else [settings.block_k, settings.block_n]
        )
        operands = (
            TensorDescriptor.from_tensor(x, [settings.block_m, settings.block_k]),
            TensorDescriptor.from_tensor(w, shape),
        )
    return operands, tiles | {
        "GROUP": settings.group,
        "DESCRIPTOR": settings.descriptor and aligned,
        "UPCAST": INTERPRETED,
        "PRECISION": precision(x.dtype),
        "STAGES": settings.stages,
        "num_warps": settings.warps,
    }


@launches
def linear_gelu(x: Tensor, w: Tensor, bias: Tensor, keep_h: bool) -> tuple[Tensor, Tensor]:
    """Launch our product that contains the GELU: return h = x w^T + bias, and a = gelu(h).

    x (M, K) and w (N, K) are contiguous. h is empty unless `keep_h` is set.
    """
    from var_kernels.mlp import triton as kernels

    (M, K), N = x.shape, w.shape[0]
    a = x.new_empty(M, N)
    h = torch.empty_like(a) if keep_h else a
    operands, settings = _product_arguments(x, w, w_by_row=True)
    tiles = -(-M // settings["BLOCK_M"]) * -(-N // settings["BLOCK_N"])
    kernels.linear_gelu[(min(tiles, multiprocessors(x.device)),)](
        *operands,
        bias.contiguous(),
        h,
        a,
        M,
        N,
        K,
        x.stride(0),
        w.stride(0),
        KEEP_H=keep_h,
        **settings,
    )
    return h if keep_h else x.new_empty(0), a


@launches
def linear_gelu_backward(
    dy: Tensor, w: Tensor, h: Tensor, want_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch our product dy w that contains the gradient of the GELU.

    Returns dh, a, and the column sums of dh, for dy (M, K), w (K, N), h (M, N). a is empty unless
    `want_a` is set.
    """
    from var_kernels.mlp import triton as kernels

    (M, K), N = dy.shape, w.shape[1]
    dh, a = torch.empty_like(h), torch.empty_like(h) if want_a else h.new_empty(0)
    operands, settings = _product_arguments(dy, w, w_by_row=False)
    down = -(-M // settings["BLOCK_M"])
    partial = torch.empty(down, N, dtype=torch.float32, device=h.device)
    programs = min(down * -(-N // settings["BLOCK_N"]), multiprocessors(h.device))
    kernels.linear_gelu_backward[(programs,)](
        *operands, h, dh, a, partial, M, N, K, dy.stride(0), w.stride(0), WRITE_A=want_a, **settings
    )
    return dh, a, partial.sum(0)


def _ours(x: Tensor, hidden: int) -> bool:
    """Return whether our own products run."""
    return (
        _kernels(x)
        and choice(x.device, x.dtype, x.shape[-1], hidden, x.numel() // x.shape[-1]) == "triton"
    )


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, h, a); h and a are empty unless they are kept."""
    with torch.autocast(x.device.type, enabled=False):
        if _ours(x, w1.shape[0]):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            h, a = linear_gelu(
                rows, w1.to(x.dtype).contiguous(), b1.to(x.dtype), keep_h=save != "input"
            )
            h, a = h.view(*x.shape[:-1], -1) if h.numel() else h, a.view(*x.shape[:-1], -1)
        else:
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
        if _ours(x, w1.shape[0]):
            dh, again, db1 = linear_gelu_backward(
                dy_NC.contiguous(), w2.to(x.dtype).contiguous(), h, want_a=a.numel() == 0
            )
        else:
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
