"""Attention back-ends behind one name each, and the block-causal mask.

| name | trains | samples | what it is |
|---|---|---|---|
| triton | yes | yes | var_kernels: packed qkv, norms fused, no mask tensor; NVIDIA GPUs from Ampere on |
| flex | yes | yes | torch's FlexAttention with its block mask |
| flash | no | yes | flash-attn: it has no block-causal mask, so only the unmasked attention of sampling |
| xformers | yes | yes | memory_efficient_attention with a mask tensor |
| blocks | yes | yes | one product a scale over the keys it sees (blocks.py); CPUs: long schedules, sampling in half precision |
| sdpa | yes | yes | torch's scaled_dot_product_attention with a mask tensor; everywhere, the definition of the others |

On one CPU core with L = 30, head dims 8 and 64, forward and backward, sdpa takes 1.05-1.15 times an explicit softmax.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels import append_to_cache, block_attention, cached_attention, use_triton, why_not
from var_kernels.attention import scales
from var_kernels.attention.reference import MAX_LOG_SCALE
from var_kernels.dispatch import compute_dtype
from var_scale.errors import UserError
from var_scale.model.blocks import SHORTEST, blocks, unmasked
from var_scale.scales import PatchNum, cells, length

# (q, k, v: (B, H, L, D); bias: (1, 1, Lq, Lk), 0 or -inf, or None; scale) -> (B, H, L, D)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class ScaleMask:
    """The block-causal mask of a scale schedule: as the schedule, and as a tensor only for back-ends that need one."""

    patch_nums: tuple[PatchNum, ...]
    buffer_11LL: Tensor
    """the bias of the whole schedule"""
    dtype: torch.dtype

    @property
    def bias_11LL(self) -> Tensor:
        """0 where the query's scale >= the key's, else -inf."""
        end = length(self.patch_nums)
        return self.buffer_11LL[:, :, :end, :end].to(self.dtype)


def sdpa(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, the definition of every other back-end.

    On the CPU it runs in float32: its bfloat16 backward takes about four times as long there (L = 30, head dim 8, one core).
    """
    if q_BHLD.device.type == "cpu" and q_BHLD.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            bias_11LL = None if bias_11LL is None else bias_11LL.float()
            return sdpa(q_BHLD.float(), k_BHLD.float(), v_BHLD.float(), bias_11LL, scale).to(q_BHLD.dtype)
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias_11LL, scale=scale)


NOT_TRAINED = "attention=flash: flash-attn has no block-causal mask, it only samples; train with triton, flex, xformers or sdpa"


def xformers(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float) -> Tensor:
    """xformers.ops.memory_efficient_attention."""
    from xformers.ops import memory_efficient_attention

    B, H, L, _ = q_BHLD.shape
    bias = None if bias_11LL is None else bias_11LL.to(q_BHLD.dtype).expand(B, H, L, -1)
    q, k, v = (t.transpose(1, 2) for t in (q_BHLD, k_BHLD, v_BHLD))
    try:
        return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)
    except NotImplementedError as error:  # a wheel for another torch has no kernels
        raise UserError(f"attention=xformers: {str(error).splitlines()[0]} here; install the xformers built for this torch, or take auto"
                        ) from None  # fmt: skip


def flash(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float) -> Tensor:
    """flash_attn.flash_attn_func, without a mask; needs float16 or bfloat16."""
    if bias_11LL is not None:
        raise UserError(NOT_TRAINED)
    if q_BHLD.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"attention=flash: flash-attn takes bfloat16 or float16, not {q_BHLD.dtype}; sample under autocast")
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (q_BHLD, k_BHLD, v_BHLD)), softmax_scale=scale).transpose(1, 2)


def _flex_block(device: torch.device) -> int:
    """Block of FlexAttention's mask. At 256 pixels 64 skips 25 % of the pairs and 128 only 0.8 %, but from Hopper on its backward pass is
    reported to have no kernel for 64 unless everything is autotuned (not tried here)."""
    return 128 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else 64


@lru_cache(maxsize=32)
def _flex_mask(patch_nums: tuple[PatchNum, ...], device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    hi_L = torch.tensor(scales(patch_nums).hi, device=device)
    L = len(hi_L)
    return create_block_mask(lambda b, h, q, kv: kv < hi_L[q], None, None, L, L, device=device.type, BLOCK_SIZE=_flex_block(device))


@lru_cache(maxsize=1)
def _flex_kernel() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: ScaleMask | None, scale: float) -> Tensor:
    """FlexAttention; compiled on GPUs, plain (slow) on CPUs."""
    from torch.nn.attention.flex_attention import flex_attention

    if mask is None:
        return sdpa(q_BHLD, k_BHLD, v_BHLD, None, scale)
    block_mask = _flex_mask(mask.patch_nums, q_BHLD.device)
    if not q_BHLD.is_cuda:
        return flex_attention(q_BHLD, k_BHLD, v_BHLD, block_mask=block_mask, scale=scale)  # type: ignore[return-value]
    return _flex_kernel()(q_BHLD, k_BHLD, v_BHLD, block_mask=block_mask, scale=scale)


BACKENDS: dict[str, Attention] = {"sdpa": sdpa, "xformers": xformers, "flash": flash}
PACKAGES = {"xformers": "xformers", "flash": "flash_attn"}


def register_backend(name: str, attention: Attention) -> None:
    """Make `attention` available by `name` to `build_var(attention=name)`."""
    BACKENDS[name] = attention


def backend_name(name: str) -> str:
    """`name`, checked. UserError for a back-end that is unknown or not installed."""
    known = ["auto", "triton", "flex", "blocks", *sorted(BACKENDS)]
    if name not in known:
        raise UserError(f"attention back-end {name!r} is not known; take one of {', '.join(known)}, or add it with register_backend")
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"attention back-end {name!r} needs {package}, which is not installed: pip install {package.replace('_', '-')} "
                        "on a Linux machine with an NVIDIA GPU; or take another, such as auto")  # fmt: skip
    return name


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """The back-end that runs on `device`, and why. UserError when one was asked for by name and cannot run there."""
    reason = why_not(device)
    if name == "blocks" and device.type != "cpu":
        raise UserError("attention=blocks: is for CPUs; take auto")
    if name == "auto" and device.type == "cpu" and reason:
        return "blocks in half precision, else sdpa", f"and sdpa below {SHORTEST} tokens; {reason}"
    if name == "auto":
        return ("sdpa", reason) if reason else ("triton", "the fused kernels run on this GPU")
    if name == "triton" and reason:
        raise UserError(f"attention=triton: {reason}; take auto or sdpa")
    return name, "asked for by name"


def require_trainable(name: str, device: torch.device) -> None:
    """UserError for a back-end that cannot train on `device`, before anything is spent."""
    backend_name(name)
    backend, _ = choose_backend(name, device)
    if backend == "flash":
        raise UserError(NOT_TRAINED)
    if backend == "flex" and device.type == "cpu":
        raise UserError("attention=flex: FlexAttention has no backward pass on CPUs; train with auto or sdpa")


def attend(
    qkv_BL3HD: Tensor, mask: Tensor | ScaleMask | None, log_scale_H: Tensor | None, scale: float, backend: str, cache: KVCache | None
) -> Tensor:
    """Self-attention of packed q, k, v by a back-end's name; returns (B, L, C).

    With `log_scale_H`: q <- q/|q| exp(min(s_h, ln 100)), k <- k/|k|. `mask`: the scale mask, a bias (1, 1, L, L), or None. With a `cache`
    the queries also see all earlier keys, and there is no mask.
    """
    B, L, _, H, D = qkv_BL3HD.shape
    if backend == "auto":
        known = isinstance(mask, ScaleMask) or (mask is None and cache is not None)  # the kernels' two forms: training, sampling
        backend = "triton" if known and use_triton(qkv_BL3HD) else "sdpa"
        short = L < SHORTEST or compute_dtype(qkv_BL3HD).itemsize > 2
        if backend == "sdpa" and qkv_BL3HD.device.type == "cpu":
            sampling = cache is not None and mask is None and not torch.is_grad_enabled()
            if (isinstance(mask, ScaleMask) and not short) or (sampling and compute_dtype(qkv_BL3HD).itemsize <= 2):
                backend = "blocks"
    if backend == "triton" and isinstance(mask, ScaleMask) and cache is None:
        return block_attention(qkv_BL3HD, mask.patch_nums, log_scale_H, scale)
    if backend == "triton" and mask is not None:
        raise UserError("attention=triton takes the block-causal mask of the model, not a tensor; take sdpa for a mask of your own")
    if backend == "triton" and cache is not None:
        begin, kv_2BHLD = cache.make_room(qkv_BL3HD)
        q_BlHD = append_to_cache(qkv_BL3HD, kv_2BHLD, begin, log_scale_H)
        k_BLHD, v_BLHD = kv_2BHLD[:, :, :, : begin + L].transpose(2, 3).unbind(0)
        return cached_attention(q_BlHD, k_BLHD, v_BLHD, scale).reshape(B, L, H * D)
    q_BHLD, k_BHLD, v_BHLD = qkv_BL3HD.permute(2, 0, 3, 1, 4).unbind(0)
    if log_scale_H is not None:
        # Under autocast the norm promotes to float32; the product runs in the dtype of v.
        q_BHLD, k_BHLD = F.normalize(qkv_BL3HD[:, :, :2].permute(2, 0, 3, 1, 4), dim=-1).unbind(0)
        q_BHLD = (q_BHLD * log_scale_H.clamp_max(MAX_LOG_SCALE).exp().view(1, H, 1, 1)).to(v_BHLD.dtype)
        k_BHLD = k_BHLD.to(v_BHLD.dtype)
    if cache is not None:
        begin, kv_2BHLD = cache.make_room(qkv_BL3HD)
        kv_2BHLD[0, :, :, begin : begin + L], kv_2BHLD[1, :, :, begin : begin + L] = k_BHLD, v_BHLD
        k_BHLD, v_BHLD = kv_2BHLD[:, :, :, : begin + L].unbind(0)
    if backend == "triton":
        return cached_attention(q_BHLD.transpose(1, 2), k_BHLD.transpose(1, 2), v_BHLD.transpose(1, 2), scale).reshape(B, L, H * D)
    if backend == "blocks" and isinstance(mask, ScaleMask):
        o_BHLD = blocks(q_BHLD, k_BHLD, v_BHLD, mask.patch_nums, scale)
    elif backend == "blocks" and cache is not None and mask is None:
        o_BHLD = unmasked(q_BHLD, k_BHLD, v_BHLD, scale)
    elif backend == "flex":
        o_BHLD = flex(q_BHLD, k_BHLD, v_BHLD, mask if isinstance(mask, ScaleMask) else None, scale)
    else:
        bias_11LL = mask.bias_11LL if isinstance(mask, ScaleMask) else mask
        o_BHLD = BACKENDS["sdpa" if backend == "blocks" else backend](q_BHLD, k_BHLD, v_BHLD, bias_11LL, scale)
    return o_BHLD.transpose(1, 2).reshape(B, L, H * D)


class KVCache:
    """Keys (after normalisation) and values of the scales already sampled, (B, H, L, D), for one block: in memory that is there from the
    first scale on where `capacity` says how many tokens will come, else grown as needed."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity, self.filled = capacity, 0
        self.kv_2BHLD: Tensor | None = None

    def make_room(self, qkv_Bl3HD: Tensor) -> tuple[int, Tensor]:
        """Room for the tokens of packed (B, l, 3, H, D): the place where they begin, and the memory (2, B, H, L, D), keys first."""
        B, l, _, H, D = qkv_Bl3HD.shape
        begin, self.filled = self.filled, self.filled + l
        if self.kv_2BHLD is None or self.filled > self.kv_2BHLD.shape[3]:
            grown_2BHLD = qkv_Bl3HD.new_empty(2, B, H, max(self.filled, self.capacity, 2 * begin), D)
            if self.kv_2BHLD is not None:
                grown_2BHLD[:, :, :, :begin] = self.kv_2BHLD[:, :, :, :begin]
            self.kv_2BHLD = grown_2BHLD
        return begin, self.kv_2BHLD


def level_index(patch_nums: Sequence[PatchNum]) -> Tensor:
    """Scale number of every token, (L,) int64."""
    return torch.cat([torch.full((count,), si, dtype=torch.int64) for si, count in enumerate(cells(patch_nums))])


def block_causal_bias(patch_nums: Sequence[PatchNum]) -> Tensor:
    """(1, 1, L, L) float32: 0 where the query's scale >= the key's scale, else -inf."""
    lvl_L = level_index(patch_nums)
    L = lvl_L.shape[0]
    return torch.zeros(L, L).masked_fill_(lvl_L[:, None] < lvl_L[None, :], -torch.inf).view(1, 1, L, L)
