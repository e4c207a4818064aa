"""Faster forms of some operations on CPUs, and the private operators of torch that they call.

Each private operator has its public form beside it, which is used where the operator is missing;
tests/model/test_cpu.py checks that both agree.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@lru_cache(maxsize=4)
def onednn(dtype: torch.dtype) -> Any:
    """oneDNN's linear for `dtype`, or None where this processor or this torch has none. The
    operator is private (torch's compiler calls it), so a small product shows whether it works."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return None
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        call = torch.ops.mkldnn._linear_pointwise.default
        one = torch.ones(1, 1, dtype=dtype)
        return call if call(one, one, one[0], "gelu", [], "tanh").shape == (1, 1) else None
    except (AttributeError, RuntimeError):
        return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x W^T + b for x (..., C) and W (F, C), and with `gelu` the tanh form of GELU of it: (..., F).

    On CPUs without gradients this is one call of oneDNN with bias and GELU inside. torch's own
    linear uses MKL in float32, whose products take 1.2 to 1.4 times as long on an AMD EPYC (more
    for few rows), and computes GELU in a pass of its own.
    """
    plain = (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or torch.compiler.is_compiling()
    )
    if (
        not plain
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and (call := onednn(x.dtype))
    ):
        form = ("gelu", "tanh") if gelu else ("none", "")
        return call(x.contiguous(), weight, bias, form[0], [], form[1])
    h = F.linear(x, weight, bias)
    return F.gelu(h, approximate="tanh") if gelu else h


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        """(..., C) -> (..., F)."""
        return linear(input, self.weight, self.bias, gelu)


def softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient of the logits of p = softmax(logits, -1) from the gradient of p. torch's
    operator reads and writes memory once; the public form takes four passes."""
    operator = getattr(torch.ops.aten, "_softmax_backward_data", None)
    if operator is None:
        return softmax_backward_public(grad, p)
    return operator(grad, p, -1, p.dtype)


def softmax_backward_public(grad: Tensor, p: Tensor) -> Tensor:
    """`softmax_backward` without a private operator; the sum is in float32 (or wider)."""
    wide = torch.promote_types(p.dtype, torch.float32)
    grad, probability = grad.to(wide), p.to(wide)
    dot = (grad * probability).sum(-1, keepdim=True)
    return (probability * (grad - dot)).to(p.dtype)


LEAST_NORM = 1e-12


def writes_out(x: Tensor) -> bool:
    """Whether operators whose backward pass is written out compute `x`: with gradients on CPUs, in
    float32 or wider and not under autocast, whose rounding they would change."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class NormalisedHeads(torch.autograd.Function):
    """q, k and v (B, H, L, D) of a packed (B, L, 3, H, D), with q <- q/|q| f_h and k <- k/|k|.

    F.normalize and the product with f take twice the time of a step's whole attention of 21 tokens,
    most of it in the many passes of autograd; this is two thirds less.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BL3HD: Tensor, factor_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`factor_H`: f, (H,)."""
        # A copy even where this order is contiguous already: what follows writes to it.
        qkv_3BHLD = qkv_BL3HD.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        qk_2BHLD = qkv_3BHLD[:2]
        # F.normalize has this least norm too, below which the quotient is linear in x.
        norm_2BHL1 = torch.linalg.vector_norm(qk_2BHLD, dim=-1, keepdim=True).clamp_min_(LEAST_NORM)
        qk_2BHLD /= norm_2BHL1
        qkv_3BHLD[0] *= factor_H.view(-1, 1, 1)
        ctx.save_for_backward(qkv_3BHLD, norm_2BHL1, factor_H)
        q_BHLD, k_BHLD, v_BHLD = qkv_3BHLD.unbind(0)
        return q_BHLD, k_BHLD, v_BHLD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq_BHLD: Tensor, dk_BHLD: Tensor, dv_BHLD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For y = x/|x| the gradient is (dy - y (y . dy)) / |x|."""
        qkv_3BHLD, norm_2BHL1, factor_H = ctx.saved_tensors
        q_BHLD, k_BHLD, _ = qkv_3BHLD.unbind(0)
        f_H11 = factor_H.view(-1, 1, 1)
        grad_BL3HD = torch.empty_like(
            qkv_3BHLD.permute(1, 3, 0, 2, 4), memory_format=torch.contiguous_format
        )
        out_q, out_k, out_v = grad_BL3HD.permute(2, 0, 3, 1, 4).unbind(0)
        # q = f y and dy = f dq, so y (y . dy) = q (q . dq) / f.
        dot_BHL1 = (dq_BHLD * q_BHLD).sum(-1, keepdim=True)
        dfactor_H = dot_BHL1.sum((0, 2, 3)) / factor_H
        dot_BHL1 *= norm_2BHL1[0] > LEAST_NORM
        torch.addcmul(dq_BHLD, q_BHLD, dot_BHL1 / f_H11**2, value=-1, out=out_q)
        out_q *= f_H11 / norm_2BHL1[0]
        dot_BHL1 = (dk_BHLD * k_BHLD).sum(-1, keepdim=True)
        dot_BHL1 *= norm_2BHL1[1] > LEAST_NORM
        torch.addcmul(dk_BHLD, k_BHLD, dot_BHL1, value=-1, out=out_k)
        out_k /= norm_2BHL1[1]
        out_v.copy_(dv_BHLD)
        return grad_BL3HD, dfactor_H


def convolve_doubled(x_BChw: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of x with every cell repeated to 2x2, in 4 of 9 products.

    Along a side each output then reads two cells of x, one of them by the sum of two weights. That
    is a transposed convolution of 4x4 weights, whose sums are rounded. On a CPU it takes half of
    the time; on a GPU it is not measured.
    """
    weight_IO33 = (
        conv.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    )
    # Four times the mean of 2x2 weights is their sum. Zeros around the kernel give the sums at its
    # edge, which have fewer weights.
    sums_IO44 = 4 * F.avg_pool2d(weight_IO33, 2, stride=1, padding=1)
    return F.conv_transpose2d(x_BChw, sums_IO44, conv.bias, stride=2, padding=1)


def keep_freed_memory() -> None:
    """Make glibc keep what this process frees for its next allocation.

    glibc gives blocks of more than 32 MiB back at once, and the system clears every page of the
    next one. The float32 decoder at 256 pixels, whose maps have 42 MB, loses 8 percent of its time
    to this. With another C library nothing changes.
    """
    # Parameters of mallopt, from malloc.h.
    trim_threshold, mmap_max = -1, -4
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
