"""Attention with an explicit softmax, whose backward pass is written out, for short sequences.

scaled_dot_product_attention on CPUs works through a sequence in blocks of its length, whose fixed
cost dominates when a sequence is short. For 21 tokens and head dim 8, forward and backward of one
layer take 0.6 of its time on one core with AVX-512, for 85 tokens the same time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from var_scale.model.attention.base import Call
from var_scale.model.attention.biased import Biased
from var_scale.model.cpu import softmax_backward, writes_out

LONGEST = 64
"""tokens up to which `auto` takes it"""


class Dense(Biased):
    """One product of all queries and keys; for CPUs."""

    def __init__(self) -> None:
        super().__init__("dense", dense)

    def runs_on(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "it is for CPUs"

    def supports(self, call: Call) -> str:
        mask = call.mask
        if isinstance(mask, Tensor) and (
            mask.shape[:2] != (1, 1) or not mask.is_floating_point() or mask.requires_grad
        ):
            return "adds a constant mask (1, 1, L, L) of numbers; use sdpa for other masks"
        return ""

    def preferable(self, call: Call) -> bool:
        """Whether `auto` takes it: in float32, for training on short sequences."""
        return (
            writes_out(call.qkv_BL3HD)
            and not self.supports(call)
            and call.cache is None
            and call.qkv_BL3HD.shape[1] <= LONGEST
        )


class DenseAttention(torch.autograd.Function):
    """softmax(scale q k^T + bias) v."""

    @staticmethod
    def forward(
        ctx: Any, q_NLD: Tensor, k_NMD: Tensor, v_NMD: Tensor, bias_1LM: Tensor | None, scale: float
    ) -> Tensor:
        """(N, L, D), (N, M, D) twice, N = batch x heads -> (N, L, D). The bias is a constant."""
        with torch.autocast("cpu", enabled=False):
            bias = q_NLD.new_zeros(1, 1, 1) if bias_1LM is None else bias_1LM.to(q_NLD.dtype)
            p_NLM = torch.baddbmm(bias, q_NLD, k_NMD.transpose(1, 2), alpha=scale).softmax(-1)
            ctx.save_for_backward(q_NLD, k_NMD, v_NMD, p_NLM)
            ctx.scale = scale
            return torch.bmm(p_NLM, v_NMD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NLD: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k and v."""
        q_NLD, k_NMD, v_NMD, p_NLM = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            dv_NMD = torch.bmm(p_NLM.transpose(1, 2), grad_NLD)
            ds_NLM = softmax_backward(torch.bmm(grad_NLD, v_NMD.transpose(1, 2)), p_NLM)
            if ctx.scale != 1.0:
                ds_NLM = ds_NLM * ctx.scale
            dq_NLD, dk_NMD = torch.bmm(ds_NLM, k_NMD), torch.bmm(ds_NLM.transpose(1, 2), q_NLD)
        return dq_NLD, dk_NMD, dv_NMD, None, None


def dense(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float
) -> Tensor:
    """(B, H, L, D) each -> (B, H, L, D)."""
    flat = (t.flatten(0, 1) for t in (q_BHLD, k_BHLD, v_BHLD))
    bias_1LL = None if bias_11LL is None else bias_11LL[0]
    return DenseAttention.apply(*flat, bias_1LL, scale).view(q_BHLD.shape)
