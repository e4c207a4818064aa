"""The codebook of a tokenizer in training, and the pixel losses.

The codebook follows the data by exponential moving averages with dead-code re-seeding; a codebook
that follows the gradient collapses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from var_scale.config.schema import TokenizerTrainConfig
from var_scale.train.world import World


@dataclass
class Codebook:
    """Moving averages behind the codebook: counts (V,) and sums (V, Z), the same on all ranks."""

    weight: Tensor
    counts: Tensor
    sums: Tensor
    world: World

    @staticmethod
    def of(weight: Tensor, world: World) -> Codebook:
        """New averages for the codebook `weight` (V, Z)."""
        return Codebook(
            weight,
            torch.ones(weight.shape[0], device=weight.device),
            weight.detach().clone(),
            world,
        )

    def reseed(self, codes: Tensor, vectors_NZ: Tensor, generator: torch.Generator) -> None:
        """Replace `codes` by random vectors from the `vectors_NZ` of all ranks."""
        # All ranks draw the same numbers, and each contributes the vectors that it holds.
        rank, size, n = self.world.rank, self.world.size, len(vectors_NZ)
        pick = torch.randint(size * n, (len(codes),), generator=generator).to(vectors_NZ.device)
        mine = (pick // n == rank)[:, None]
        chosen = self.world.reduce(
            torch.where(mine, vectors_NZ[pick % n], torch.zeros_like(vectors_NZ[:1]))
        )
        self.weight[codes] = chosen
        self.sums[codes] = chosen
        self.counts[codes] = 1.0

    def update(
        self,
        idx_N: Tensor,
        vectors_NZ: Tensor,
        decay: float,
        dead: float,
        generator: torch.Generator,
    ) -> None:
        """One step of the averages: they follow the batch, and dead codes become residuals of
        it."""
        batch_counts = torch.bincount(idx_N, minlength=len(self.counts)).to(self.counts.dtype)
        batch_sums = torch.zeros_like(self.sums).index_add_(0, idx_N, vectors_NZ)
        # One exchange for both.
        both = self.world.reduce(torch.cat([batch_counts[:, None], batch_sums], dim=1))
        self.counts.mul_(decay).add_(both[:, 0], alpha=1 - decay)
        self.sums.mul_(decay).add_(both[:, 1:], alpha=1 - decay)
        # A code is the mean of the vectors that chose it; the bound keeps a dead code finite.
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        gone = (self.counts < dead).nonzero().squeeze(1)
        if len(gone):
            self.reseed(gone, vectors_NZ, generator)


def pixel_loss(out_BCHW: Tensor, img_BCHW: Tensor, recipe: TokenizerTrainConfig) -> Tensor:
    """Weighted sum of MSE, L1, and L1 of a three-level Laplacian pyramid; ()."""
    # The pyramid is linear: the pyramid of the difference is the difference of the pyramids.
    difference = out_BCHW - img_BCHW
    loss = recipe.l2 * difference.square().mean() + recipe.l1 * difference.abs().mean()
    for _ in range(3 if recipe.pyramid else 0):
        if min(difference.shape[-2:]) < 2:
            break
        low = F.avg_pool2d(difference, 2, ceil_mode=True, count_include_pad=False)
        band = difference - F.interpolate(
            low, size=difference.shape[-2:], mode="bilinear", align_corners=False
        )
        loss = loss + recipe.pyramid / 3 * band.abs().mean()
        difference = low
    return loss
