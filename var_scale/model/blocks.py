"""Block-causal attention on CPUs: one product a scale over the keys it sees, nothing computed that is masked, and a backward of its own.

On two cores with AVX-512 bf16 (d8, L = 680, batch 2) a training step in bfloat16 takes 0.82 of the time with scaled_dot_product_attention
and a mask (bench/results/cpu-d8-*), one layer's attention a third; in float32 the step gains nothing, nor do short schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from var_scale.scales import PatchNum, cells

SHORTEST = 128
"""tokens from which on it is taken by itself"""


class PrefixAttention(torch.autograd.Function):
    """softmax(scale q k^T) v of every scale's queries over all keys up to the scale's end."""

    @staticmethod
    def forward(ctx: Any, q_NLD: Tensor, k_NLD: Tensor, v_NLD: Tensor, ends: tuple[int, ...], scale: float) -> Tensor:
        """(N, L, D) each, N = batch x heads -> (N, L, D)."""
        with torch.autocast("cpu", enabled=False):
            q_NLD = q_NLD * scale if scale != 1.0 else q_NLD
            out_NLD, kept = torch.empty_like(v_NLD), []
            for start, end in pairwise((0, *ends)):
                p_Nlm = torch.bmm(q_NLD[:, start:end], k_NLD[:, :end].transpose(1, 2)).softmax(-1)
                out_NLD[:, start:end] = torch.bmm(p_Nlm, v_NLD[:, :end])
                kept.append(p_Nlm)
        ctx.save_for_backward(q_NLD, k_NLD, v_NLD, *kept)
        ctx.ends, ctx.scale = ends, scale
        return out_NLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NLD: Tensor) -> tuple[Tensor | None, ...]:
        """Sums over scales in float32 (or wider)."""
        q_NLD, k_NLD, v_NLD, *kept = ctx.saved_tensors
        wide = torch.promote_types(k_NLD.dtype, torch.float32)
        dq_NLD, dk_NLD, dv_NLD = torch.empty_like(q_NLD), *(torch.zeros(t.shape, dtype=wide) for t in (k_NLD, v_NLD))
        with torch.autocast("cpu", enabled=False):
            for (start, end), p_Nlm in zip(pairwise((0, *ctx.ends)), kept, strict=True):
                g_NlD = grad_NLD[:, start:end]
                dv_NLD[:, :end] += torch.bmm(p_Nlm.transpose(1, 2), g_NlD)
                dp_Nlm = torch.bmm(g_NlD, v_NLD[:, :end].transpose(1, 2))
                ds_Nlm = torch.ops.aten._softmax_backward_data(dp_Nlm, p_Nlm, -1, p_Nlm.dtype)
                dq_NLD[:, start:end] = torch.bmm(ds_Nlm, k_NLD[:, :end])
                dk_NLD[:, :end] += torch.bmm(ds_Nlm.transpose(1, 2), q_NLD[:, start:end])
        if ctx.scale != 1.0:
            dq_NLD *= ctx.scale
        return dq_NLD, dk_NLD.to(k_NLD.dtype), dv_NLD.to(v_NLD.dtype), None, None


def unmasked(q_BHlD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of one scale's queries over all keys there are, as sampling takes it; in half precision half the time of
    scaled_dot_product_attention (256 queries, 680 keys). No gradient of its own."""
    q_NlD, k_NLD, v_NLD = (t.reshape(-1, *t.shape[2:]) for t in (q_BHlD * scale if scale != 1.0 else q_BHlD, k_BHLD, v_BHLD))
    return torch.bmm(torch.bmm(q_NlD, k_NLD.transpose(1, 2)).softmax(-1), v_NLD).view(q_BHlD.shape)


def blocks(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, patch_nums: Sequence[PatchNum], scale: float) -> Tensor:
    """(B, H, L, D) each -> (B, H, L, D), over the whole schedule."""
    ends = tuple(accumulate(cells(patch_nums)))
    flat = (t.flatten(0, 1) for t in (q_BHLD, k_BHLD, v_BHLD))
    return PrefixAttention.apply(*flat, ends, scale).view(q_BHLD.shape)
