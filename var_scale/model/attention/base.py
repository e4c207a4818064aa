"""What every attention back-end is given and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels.attention.reference import MAX_LOG_SCALE
from var_scale.model.attention.mask import ScaleMask
from var_scale.model.cpu import NormalisedHeads, writes_out


class KVCache:
    """The keys (normalised) and values of the scales that are already sampled, for one block. The
    memory is allocated at the first scale for `capacity` tokens, and grows if more come."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity, self.filled = capacity, 0
        self.kv_2BHLD: Tensor | None = None

    def make_room(self, qkv_Bl3HD: Tensor) -> tuple[int, Tensor]:
        """Room for the tokens of a packed (B, l, 3, H, D). Returns the place of the first of them
        and the memory (2, B, H, L, D), keys first."""
        B, l, _, H, D = qkv_Bl3HD.shape
        begin, self.filled = self.filled, self.filled + l
        if self.kv_2BHLD is None or self.filled > self.kv_2BHLD.shape[3]:
            # Doubling keeps the number of copies logarithmic where the capacity is unknown.
            grown_2BHLD = qkv_Bl3HD.new_empty(
                2, B, H, max(self.filled, self.capacity, 2 * begin), D
            )
            if self.kv_2BHLD is not None:
                grown_2BHLD[:, :, :, :begin] = self.kv_2BHLD[:, :, :, :begin]
            self.kv_2BHLD = grown_2BHLD
        return begin, self.kv_2BHLD


@dataclass(frozen=True)
class Call:
    """One call of self-attention."""

    qkv_BL3HD: Tensor
    """the packed projection"""
    mask: Tensor | ScaleMask | None
    """the mask of the model, a bias (1, 1, L, L) to add to the scores, or None"""
    log_scale_H: Tensor | None
    """with it q <- q/|q| exp(min(s_h, ln 100)) and k <- k/|k|"""
    scale: float
    """the factor of q k^T"""
    cache: KVCache | None
    """with it the queries also see the keys of all earlier calls, and `mask` is None"""

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, L, D), and k and v (B, H, L', D) with those of the cache; q and k normalised."""
        factor_H = (
            None if self.log_scale_H is None else self.log_scale_H.clamp_max(MAX_LOG_SCALE).exp()
        )
        if factor_H is not None and self.cache is None and writes_out(self.qkv_BL3HD):
            return NormalisedHeads.apply(self.qkv_BL3HD, factor_H)
        q_BHLD, k_BHLD, v_BHLD = self.qkv_BL3HD.permute(2, 0, 3, 1, 4).unbind(0)
        if factor_H is not None:
            # Unlike the `normalised` of the kernels' reference, this follows autocast, which keeps
            # half precision in the division on CPUs: recorded runs in bfloat16 rest on these bits.
            q_BHLD, k_BHLD = F.normalize(
                self.qkv_BL3HD[:, :, :2].permute(2, 0, 3, 1, 4), dim=-1
            ).unbind(0)
            # The scale is a float32 weight; the products below run in the dtype of v.
            q_BHLD = (q_BHLD * factor_H.view(1, -1, 1, 1)).to(v_BHLD.dtype)
            k_BHLD = k_BHLD.to(v_BHLD.dtype)
        if self.cache is not None:
            begin, kv_2BHLD = self.cache.make_room(self.qkv_BL3HD)
            end = begin + q_BHLD.shape[2]
            kv_2BHLD[0, :, :, begin:end], kv_2BHLD[1, :, :, begin:end] = k_BHLD, v_BHLD
            k_BHLD, v_BHLD = kv_2BHLD[:, :, :, :end].unbind(0)
        return q_BHLD, k_BHLD, v_BHLD


def joined(o_BHLD: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H D)."""
    return o_BHLD.transpose(1, 2).flatten(2)


class Backend(ABC):
    """One way to compute self-attention. Every question is answered by the reason against it."""

    name: str
    package = ""
    """the package to install"""
    own_mask = "uses the block-causal mask of the model, not a tensor; use sdpa for other masks"

    def runs_on(self, device: torch.device) -> str:
        """Why it cannot run on `device`; empty if it can."""
        return ""

    def trains_on(self, device: torch.device) -> str:
        """Why it cannot train on `device`, where it runs; empty if it can."""
        return ""

    def supports(self, call: Call) -> str:
        """Why it cannot compute `call`; empty if it can."""
        return self.own_mask if isinstance(call.mask, Tensor) else ""

    def preferable(self, call: Call) -> bool:
        """Whether `auto` chooses it for `call` before the back-ends that come later."""
        return not self.supports(call)

    @abstractmethod
    def __call__(self, call: Call) -> Tensor:
        """The attention of a call that it supports: (B, L, H D)."""
