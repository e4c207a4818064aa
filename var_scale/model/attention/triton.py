"""The fused kernels of var_kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from var_kernels import append_to_cache, block_attention, cached_attention, use_triton, why_not
from var_scale.model.attention.base import Backend, Call
from var_scale.model.attention.mask import ScaleMask


class Triton(Backend):
    """Packed q, k, v as they lie, norms inside the kernels, and no mask tensor. Where the kernels
    cannot run, the operators take their PyTorch form, which defines them."""

    name = "triton"

    def runs_on(self, device: torch.device) -> str:
        return why_not(device)

    def supports(self, call: Call) -> str:
        masked_cache = call.cache is not None and call.mask is not None
        return self.own_mask if masked_cache else super().supports(call)

    def preferable(self, call: Call) -> bool:
        """Whether `auto` takes it: the kernels have two forms, for training and for sampling."""
        known = isinstance(call.mask, ScaleMask) != (call.cache is not None)
        return known and not self.supports(call) and use_triton(call.qkv_BL3HD)

    def __call__(self, call: Call) -> Tensor:
        qkv_BL3HD, cache = call.qkv_BL3HD, call.cache
        if isinstance(call.mask, ScaleMask):
            return block_attention(qkv_BL3HD, call.mask.patch_nums, call.log_scale_H, call.scale)
        if cache is None:
            # Every key is visible, as in sampling, but they are not in a cache.
            q_BLHD, k_BLHD, v_BLHD = (t.transpose(1, 2) for t in call.heads())
            return cached_attention(q_BLHD, k_BLHD, v_BLHD, call.scale).flatten(2)
        begin, kv_2BHLD = cache.make_room(qkv_BL3HD)
        q_BlHD = append_to_cache(qkv_BL3HD, kv_2BHLD, begin, call.log_scale_H)
        end = begin + qkv_BL3HD.shape[1]
        k_BLHD, v_BLHD = kv_2BHLD[:, :, :, :end].transpose(2, 3).unbind(0)
        return cached_attention(q_BlHD, k_BLHD, v_BLHD, call.scale).flatten(2)
