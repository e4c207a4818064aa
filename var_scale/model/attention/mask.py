"""The block-causal mask: a token sees its own scale and all coarser ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from var_scale.scales import PatchNum, cells, length


@dataclass(frozen=True)
class ScaleMask:
    """The block-causal mask of a scale schedule. Most back-ends need only the schedule; `bias_11LL`
    makes a tensor for those that need one."""

    patch_nums: tuple[PatchNum, ...]
    buffer_11LL: Tensor
    """bias of the model's whole schedule, of which `patch_nums` is a prefix"""
    dtype: torch.dtype

    @property
    def bias_11LL(self) -> Tensor:
        """0 where the scale of the query is at least that of the key, else -inf."""
        end = length(self.patch_nums)
        return self.buffer_11LL[:, :, :end, :end].to(self.dtype)


def level_index(patch_nums: Sequence[PatchNum]) -> Tensor:
    """Number of the scale of every token, (L,) int64."""
    return torch.cat(
        [torch.full((count,), si, dtype=torch.int64) for si, count in enumerate(cells(patch_nums))]
    )


def block_causal_bias(patch_nums: Sequence[PatchNum]) -> Tensor:
    """(1, 1, L, L) float32: 0 where the query's scale is at least the key's, else -inf."""
    lvl_L = level_index(patch_nums)
    L = lvl_L.shape[0]
    return (
        torch.zeros(L, L).masked_fill_(lvl_L[:, None] < lvl_L[None, :], -torch.inf).view(1, 1, L, L)
    )
