"""Back-ends that add a mask tensor to the scores: sdpa, xformers, flash-attn and those of users."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from var_scale.errors import UserError
from var_scale.model.attention.base import Backend, Call, joined
from var_scale.model.attention.mask import ScaleMask

# (q, k, v: (B, H, L, D); bias: (1, 1, Lq, Lk), 0 or -inf, or None; scale) -> (B, H, L, D)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


class Biased(Backend):
    """A function of q, k, v, a bias and the scale."""

    def __init__(self, name: str, attention: Attention, package: str = "") -> None:
        self.name, self.attention, self.package = name, attention, package

    def supports(self, call: Call) -> str:
        return ""

    def __call__(self, call: Call) -> Tensor:
        bias_11LL = call.mask.bias_11LL if isinstance(call.mask, ScaleMask) else call.mask
        return joined(self.attention(*call.heads(), bias_11LL, call.scale))


class Flash(Biased):
    """flash-attn has no mask tensor and no block-causal mask, so it only samples."""

    def __init__(self) -> None:
        super().__init__("flash", flash, "flash_attn")

    def trains_on(self, device: torch.device) -> str:
        return (
            "flash-attn has no block-causal mask, so it only samples; train with triton, flex, "
            "xformers or sdpa"
        )

    def supports(self, call: Call) -> str:
        dtype = call.qkv_BL3HD.dtype
        if call.mask is not None:
            return self.trains_on(call.qkv_BL3HD.device)
        if dtype not in (torch.bfloat16, torch.float16):
            return f"flash-attn needs bfloat16 or float16, not {dtype}; sample under autocast"
        return ""


def sdpa(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float
) -> Tensor:
    """torch's scaled_dot_product_attention, the definition of every other back-end."""
    if q_BHLD.device.type == "cpu" and q_BHLD.dtype in (torch.bfloat16, torch.float16):
        # In float32, because the bfloat16 backward pass takes about four times as long on CPUs
        # (L = 30, head dim 8, one core).
        with torch.autocast("cpu", enabled=False):
            bias_11LL = None if bias_11LL is None else bias_11LL.float()
            wide_BHLD = sdpa(q_BHLD.float(), k_BHLD.float(), v_BHLD.float(), bias_11LL, scale)
            return wide_BHLD.to(q_BHLD.dtype)
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias_11LL, scale=scale)


def xformers(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float
) -> Tensor:
    """xformers.ops.memory_efficient_attention."""
    from xformers.ops import memory_efficient_attention

    B, H, L, _ = q_BHLD.shape
    bias = None if bias_11LL is None else bias_11LL.to(q_BHLD.dtype).expand(B, H, L, -1)
    q, k, v = (t.transpose(1, 2) for t in (q_BHLD, k_BHLD, v_BHLD))
    try:
        return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)
    except NotImplementedError as error:
        # A wheel that was built for another torch installs, but has no kernels.
        raise UserError(
            f"attention=xformers: {str(error).splitlines()[0]}; install the xformers that was "
            "built for this torch, or use auto",
            code="model.attention-package",
        ) from None


def flash(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float
) -> Tensor:
    """flash_attn.flash_attn_func, without a mask; needs float16 or bfloat16."""
    from flash_attn import flash_attn_func

    assert bias_11LL is None
    q, k, v = (t.transpose(1, 2) for t in (q_BHLD, k_BHLD, v_BHLD))
    return flash_attn_func(q, k, v, softmax_scale=scale).transpose(1, 2)
