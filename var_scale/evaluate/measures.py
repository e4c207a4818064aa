"""Sample quality by the definitions of the ADM evaluator (Dhariwal and Nichol, arXiv 2105.05233).

- FID and sFID: Fréchet distance of pooled features, or of the first channels of spatial features.
- IS: exp of the mean KL divergence of the class probabilities from their mean, in splits of 5,000.
- Precision and recall (Kynkäänniemi et al., arXiv 1904.06991): the share of samples inside of the
  manifold of the reference, and vice versa. A manifold consists of balls that reach to the third
  neighbour.

Distances are float32 here. The ADM evaluator uses float16 if it does not overflow, so its precision
and recall may differ a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""A ball of a manifold reaches to this neighbour of its centre."""
SPLIT = 5000
"""Samples of one split of the inception score."""
BLOCK = 2048
"""Points whose distances to all others are computed at a time."""


def inception_score(probabilities_NK: Tensor, split: int = SPLIT) -> tuple[float, float]:
    """Mean and standard deviation over splits of `split` samples in order; the last may be
    smaller."""
    scores = []
    for part in probabilities_NK.double().split(split):
        mean_K = part.mean(0, keepdim=True)
        divergence_N = (
            torch.special.xlogy(part, part) - torch.special.xlogy(part, mean_K.expand_as(part))
        ).sum(1)
        scores.append(math.exp(float(divergence_N.mean())))
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def radii(features_ND: Tensor) -> Tensor:
    """Distance of every point to its third neighbour: (N,)."""
    found = []
    for start in range(0, len(features_ND), BLOCK):
        distances = torch.cdist(
            features_ND[start : start + BLOCK],
            features_ND,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        # The nearest is the point itself.
        found.append(distances.kthvalue(NEIGHBOURS + 1, dim=1).values)
    return torch.cat(found)


def inside(points_MD: Tensor, centres_ND: Tensor, radii_N: Tensor) -> Tensor:
    """Whether each point is inside of any ball: (M,) bool."""
    found = []
    for start in range(0, len(points_MD), BLOCK):
        distances = torch.cdist(
            points_MD[start : start + BLOCK],
            centres_ND,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        found.append((distances <= radii_N[None]).any(1))
    return torch.cat(found)


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall, as fractions."""

    precision: float
    """share of samples inside of the manifold of the reference"""
    recall: float
    """share of the reference inside of the manifold of the samples"""


def precision_recall(reference_ND: Tensor, samples_MD: Tensor) -> PrecisionRecall:
    """Precision and recall of samples (M, D) against a reference (N, D)."""
    reference_ND, samples_MD = reference_ND.float(), samples_MD.float()
    return PrecisionRecall(
        float(inside(samples_MD, reference_ND, radii(reference_ND)).double().mean()),
        float(inside(reference_ND, samples_MD, radii(samples_MD)).double().mean()),
    )
