"""Exact number of floating-point operations per image.

One multiply-accumulate (MAC) is 2 FLOPs. Only matrix products count: norms, softmax and
element-wise operations are below 1 % of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape


@dataclass(frozen=True)
class FlopCount:
    """Operations for one image of L tokens."""

    tokens: int
    """L"""
    forward_macs: int
    """MACs of a forward pass; the compute in the paper is this times images / 1e15"""
    forward: int
    """FLOPs of a forward pass, 2 x MACs"""
    training: int
    """FLOPs of a forward and a backward pass, 3 x forward; without recomputation"""
    training_6nd: int
    """6 N D with the paper's N and D = L tokens, for comparison; larger than the exact count"""

    @property
    def paper(self) -> int:
        """MACs of a forward pass, the convention of the paper's figures."""
        return self.forward_macs


def count_flops(shape: ModelShape) -> FlopCount:
    """Count the operations for one image.

    MACs = d L (4 C^2 + 2 C M) + 2 d C P + A + L C V + (L - 1) Z C

    P is the number of visible (query, key) pairs of block-causal attention. A are the AdaLN
    layers, which run once per image: 6 C^2 per block (once in all when shared), and 2 C^2 before
    the head. The first scale starts from the class embedding, so L - 1 tokens are embedded.
    """
    C, d, L = shape.width, shape.depth, shape.length
    per_token = d * (4 * C * C + 2 * C * shape.mlp_hidden)
    attention = 2 * d * C * shape.visible_pairs
    adaln = 6 * C * C * (1 if shape.shared_aln else d) + 2 * C * C
    head = L * C * shape.vocab_size
    embed = (L - 1) * shape.latent_channels * C
    macs = L * per_token + attention + adaln + head + embed
    return FlopCount(L, macs, 2 * macs, 6 * macs, 6 * count_params(shape).paper * L)
