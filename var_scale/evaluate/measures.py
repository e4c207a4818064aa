"""Sample quality by the ADM evaluator's definitions (Dhariwal and Nichol 2021) in plain numerical code, over features from anywhere.

FID, sFID: Frechet distance of pooled, or of the first channels of spatial, features. IS: exp of the mean KL divergence of the class
probabilities from their mean, in splits of 5,000. Precision and recall (Kynkaanniemi et al. 2019): the share of samples inside the
manifold of the reference, and the other way round, a manifold being balls to the third neighbour. Distances are float32 here; the ADM
evaluator takes float16 where that does not overflow, so its precision and recall may differ a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
SPLIT = 5000
BLOCK = 2048


def inception_score(probabilities_NK: Tensor, split: int = SPLIT) -> tuple[float, float]:
    """Mean and standard deviation over splits of `split` samples in order, the last as many as are left."""
    scores = []
    for part in probabilities_NK.double().split(split):
        mean_K = part.mean(0, keepdim=True)
        divergence_N = (torch.special.xlogy(part, part) - torch.special.xlogy(part, mean_K.expand_as(part))).sum(1)
        scores.append(math.exp(float(divergence_N.mean())))
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def radii(features_ND: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Distance of every point to its `neighbours`-th neighbour: (N,)."""
    found = []
    for start in range(0, len(features_ND), BLOCK):
        distances = torch.cdist(features_ND[start : start + BLOCK], features_ND, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.kthvalue(neighbours + 1, dim=1).values)  # the first is the point itself
    return torch.cat(found)


def inside(points_MD: Tensor, centres_ND: Tensor, radii_N: Tensor) -> Tensor:
    """Whether each point lies in any ball: (M,) bool."""
    found = []
    for start in range(0, len(points_MD), BLOCK):
        distances = torch.cdist(points_MD[start : start + BLOCK], centres_ND, compute_mode="donot_use_mm_for_euclid_dist")
        found.append((distances <= radii_N[None]).any(1))
    return torch.cat(found)


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares."""

    precision: float
    """of samples inside the reference's manifold"""
    recall: float
    """of the reference inside the samples' manifold"""


def precision_recall(reference_ND: Tensor, samples_MD: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """By nearest neighbours, float32."""
    reference_ND, samples_MD = reference_ND.float(), samples_MD.float()
    return PrecisionRecall(
        float(inside(samples_MD, reference_ND, radii(reference_ND, neighbours)).double().mean()),
        float(inside(reference_ND, samples_MD, radii(samples_MD, neighbours)).double().mean()),
    )
