"""torch's FlexAttention."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from var_kernels.attention import scales
from var_scale.model.attention.base import Backend, Call, joined
from var_scale.model.attention.biased import sdpa
from var_scale.model.attention.mask import ScaleMask
from var_scale.scales import PatchNum


class Flex(Backend):
    """FlexAttention with a block mask: compiled on GPUs, uncompiled and slow on CPUs."""

    name = "flex"

    def trains_on(self, device: torch.device) -> str:
        if device.type != "cpu":
            return ""
        return "FlexAttention has no backward pass on CPUs; train with auto or sdpa"

    def __call__(self, call: Call) -> Tensor:
        # Imported late: it loads torch's compiler, which takes a second.
        from torch.nn.attention.flex_attention import flex_attention

        q_BHLD, k_BHLD, v_BHLD = call.heads()
        # Sampling has no mask, and its lengths change with every scale: each would be compiled.
        if not isinstance(call.mask, ScaleMask):
            return joined(sdpa(q_BHLD, k_BHLD, v_BHLD, None, call.scale))
        function = _compiled() if q_BHLD.is_cuda else flex_attention
        block_mask = _block_mask(call.mask.patch_nums, q_BHLD.device)
        return joined(function(q_BHLD, k_BHLD, v_BHLD, block_mask=block_mask, scale=call.scale))


def _block_size(device: torch.device) -> int:
    """Side of a block of the mask.

    At 256 pixels blocks of 64 skip 25 % of the pairs and blocks of 128 only 0.8 %. From Hopper on
    the backward pass is reported to have no kernel for 64 unless everything is autotuned, which was
    not tried here.
    """
    return 128 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else 64


@lru_cache(maxsize=32)
def _block_mask(patch_nums: tuple[PatchNum, ...], device: torch.device) -> Any:
    """The block-causal mask: query q sees the keys before `hi_L[q]`, the end of its scale."""
    from torch.nn.attention.flex_attention import create_block_mask

    hi_L = torch.tensor(scales(patch_nums).hi, device=device)
    L, side = len(hi_L), _block_size(device)
    return create_block_mask(
        lambda b, h, q, kv: kv < hi_L[q], None, None, L, L, device=device.type, BLOCK_SIZE=side
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """FlexAttention, compiled once for all models; uncompiled it computes all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
