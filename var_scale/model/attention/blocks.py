"""Block-causal attention on CPUs: one product per scale over the keys that the scale sees.

Nothing is computed that the mask would hide, and the backward pass is written out. On two cores
with AVX-512 bf16 (d8, L = 680, batch 2) a training step in bfloat16 takes 0.82 of its time with
scaled_dot_product_attention and a mask (bench/results/cpu-d8-*), and one layer's attention a third.
In float32 the step gains nothing, nor do short schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from var_kernels.dispatch import compute_dtype
from var_scale.model.attention.base import Backend, Call, joined
from var_scale.model.attention.mask import ScaleMask
from var_scale.model.cpu import softmax_backward
from var_scale.scales import PatchNum, cells

SHORTEST = 128
"""tokens from which on `auto` takes it"""


class Blocks(Backend):
    """One product per scale; for CPUs."""

    name = "blocks"

    def runs_on(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "it is for CPUs"

    def preferable(self, call: Call) -> bool:
        """Whether `auto` takes it: in half precision, for long schedules and for sampling."""
        qkv_BL3HD = call.qkv_BL3HD
        if self.runs_on(qkv_BL3HD.device) or compute_dtype(qkv_BL3HD).itemsize > 2:
            return False
        if isinstance(call.mask, ScaleMask):
            return qkv_BL3HD.shape[1] >= SHORTEST
        # `unmasked` saves nothing for a backward pass, so sdpa is better with gradients.
        return call.mask is None and call.cache is not None and not torch.is_grad_enabled()

    def __call__(self, call: Call) -> Tensor:
        q_BHLD, k_BHLD, v_BHLD = call.heads()
        if isinstance(call.mask, ScaleMask):
            return joined(blocks(q_BHLD, k_BHLD, v_BHLD, call.mask.patch_nums, call.scale))
        return joined(unmasked(q_BHLD, k_BHLD, v_BHLD, call.scale))


class PrefixAttention(torch.autograd.Function):
    """softmax(scale q k^T) v of every scale's queries over all keys up to the scale's end."""

    @staticmethod
    def forward(
        ctx: Any, q_NLD: Tensor, k_NLD: Tensor, v_NLD: Tensor, ends: tuple[int, ...], scale: float
    ) -> Tensor:
        """(N, L, D) each, N = batch x heads -> (N, L, D). `ends`: where each scale ends."""
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
        """The gradients of q, k and v. A key is seen by many scales. The sums over them are in
        float32 (or wider): in half precision each addition would round."""
        # q was saved with the scale in it: dk needs no factor, and dq gets it at the end.
        q_NLD, k_NLD, v_NLD, *kept = ctx.saved_tensors
        wide = torch.promote_types(k_NLD.dtype, torch.float32)
        dq_NLD, dk_NLD, dv_NLD = (
            torch.empty_like(q_NLD),
            *(torch.zeros(t.shape, dtype=wide) for t in (k_NLD, v_NLD)),
        )
        with torch.autocast("cpu", enabled=False):
            for (start, end), p_Nlm in zip(pairwise((0, *ctx.ends)), kept, strict=True):
                g_NlD = grad_NLD[:, start:end]
                dv_NLD[:, :end] += torch.bmm(p_Nlm.transpose(1, 2), g_NlD)
                dp_Nlm = torch.bmm(g_NlD, v_NLD[:, :end].transpose(1, 2))
                ds_Nlm = softmax_backward(dp_Nlm, p_Nlm)
                dq_NLD[:, start:end] = torch.bmm(ds_Nlm, k_NLD[:, :end])
                dk_NLD[:, :end] += torch.bmm(ds_Nlm.transpose(1, 2), q_NLD[:, start:end])
        if ctx.scale != 1.0:
            dq_NLD *= ctx.scale
        return dq_NLD, dk_NLD.to(k_NLD.dtype), dv_NLD.to(v_NLD.dtype), None, None


def unmasked(q_BHlD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of one scale's queries over all keys so far, as in sampling. In half
    precision it takes half the time of scaled_dot_product_attention (256 queries, 680 keys)."""
    q_NlD, k_NLD, v_NLD = (
        t.reshape(-1, *t.shape[2:])
        for t in (q_BHlD * scale if scale != 1.0 else q_BHlD, k_BHLD, v_BHLD)
    )
    return torch.bmm(torch.bmm(q_NlD, k_NLD.transpose(1, 2)).softmax(-1), v_NLD).view(q_BHlD.shape)


def blocks(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, patch_nums: Sequence[PatchNum], scale: float
) -> Tensor:
    """(B, H, L, D) each -> (B, H, L, D), over the whole schedule."""
    ends = tuple(accumulate(cells(patch_nums)))
    flat = (t.flatten(0, 1) for t in (q_BHLD, k_BHLD, v_BHLD))
    return PrefixAttention.apply(*flat, ends, scale).view(q_BHLD.shape)
