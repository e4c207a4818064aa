"""Fréchet distance between two sets of images from the mean and covariance of their features
(Heusel et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features (n, D) that come in batches, in float64."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.total_D = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.shift_D: Tensor | None = None

    def add(self, features_ND: Tensor) -> None:
        """Add a batch of features (N, D)."""
        features_ND = features_ND.double()
        # Sums of squares about a point near the mean do not cancel in the covariance.
        if self.shift_D is None:
            self.shift_D = features_ND.mean(0)
        features_ND = features_ND - self.shift_D
        self.count += len(features_ND)
        self.total_D += features_ND.sum(0)
        self.products_DD += features_ND.T @ features_ND

    @property
    def mean_D(self) -> Tensor:
        """The mean (D,)."""
        assert self.shift_D is not None
        return self.shift_D + self.total_D / self.count

    @property
    def covariance_DD(self) -> Tensor:
        """The unbiased covariance (D, D)."""
        mean_D = self.total_D / self.count
        return (self.products_DD - self.count * mean_D[:, None] * mean_D[None]) / (self.count - 1)


def frechet(one: Moments, two: Moments) -> float:
    """`frechet_distance` of two sets of features."""
    return frechet_distance(one.mean_D, one.covariance_DD, two.mean_D, two.covariance_DD)


def frechet_distance(mean1_D: Tensor, cov1_DD: Tensor, mean2_D: Tensor, cov2_DD: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) in float64.

    The square roots come from the eigenvalues of symmetric matrices, so they are real.
    """
    mean1_D, cov1_DD, mean2_D, cov2_DD = (t.double() for t in (mean1_D, cov1_DD, mean2_D, cov2_DD))
    values_D, vectors_DD = torch.linalg.eigh(cov1_DD)
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    crossed_D = torch.linalg.eigvalsh(root_DD @ cov2_DD @ root_DD).clamp(min=0).sqrt()
    distance = (
        (mean1_D - mean2_D).square().sum() + cov1_DD.trace() + cov2_DD.trace() - 2 * crossed_D.sum()
    )
    return float(distance.clamp(min=0))
