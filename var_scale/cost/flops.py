"""Exact floating-point operations of one image (spec/var-reference.md 1.12, spec/scaling.md 0.4).

One multiply-accumulate (MAC) is 2 FLOPs. Matrix products only: norms, softmax and element-wise work are below 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape


@dataclass(frozen=True)
class FlopCount:
    """Work of one image of L tokens."""

    tokens: int
    """L"""
    forward_macs: int
    """forward multiply-accumulates; the paper's compute is this x images / 1e15"""
    forward: int
    """forward FLOPs, 2 x MACs"""
    training: int
    """forward and backward, 3 x forward; no recomputation"""
    training_6nd: int
    """the 6 N D convention with the paper's N and D = L tokens, for comparison; it over-counts by depth"""

    @property
    def paper(self) -> int:
        """The convention that matches the paper's figures: forward MACs."""
        return self.forward_macs


def count_flops(shape: ModelShape) -> FlopCount:
    """Count one image. Attention counts visible pairs only, AdaLN linears once an image, the head every token.

    MACs = d L (4C^2 + 2 C M) + 2 d C P + AdaLN + L C V + (L-1) Z C, with P the block-causal pairs,
    AdaLN = 6 C^2 (d, or 1 when shared) + 2 C^2 of the head.
    """
    C, d, L = shape.width, shape.depth, shape.length
    per_token = d * (4 * C * C + 2 * C * shape.mlp_hidden)
    attention = 2 * d * C * shape.visible_pairs
    adaln = 6 * C * C * (1 if shape.shared_aln else d) + 2 * C * C
    head = L * C * shape.vocab_size
    embed = (L - 1) * shape.latent_channels * C
    macs = L * per_token + attention + adaln + head + embed
    return FlopCount(L, macs, 2 * macs, 6 * macs, 6 * count_params(shape).paper * L)
