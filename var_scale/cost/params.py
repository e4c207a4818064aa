"""Trainable parameters of a VAR transformer, exactly (spec/var-reference.md 1.11, 1.12). Buffers are not counted."""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.cost.shape import ModelShape


@dataclass(frozen=True)
class ParamCount:
    """Counts of one model; total = blocks + adaln + head + embeddings."""

    total: int
    blocks: int
    """attention and MLP of all blocks: d (4C^2 + 2C M + ...) for MLP width M"""
    adaln: int
    """AdaLN linears of the blocks: d (6C^2 + 6C), or one shared linear and d 6C offsets"""
    head: int
    """head_nm (2C^2 + 2C) and head (C V + V)"""
    embeddings: int
    """class, position, start, scale embeddings and the input projection"""
    paper: int
    """the paper's N: 18 d C^2, or 12 d C^2 with a shared AdaLN: attention, MLP and AdaLN matrices only"""
    per_token: int
    """weights that act on every token of the blocks: 12 d C^2 (AdaLN linears act once an image)"""


def count_params(shape: ModelShape) -> ParamCount:
    """Count trainable parameters by group. The official d16 at 256 px has 310,283,520."""
    C, M, d = shape.width, shape.mlp_hidden, shape.depth
    attention = 3 * C * C + 2 * C + C * C + C + (shape.heads if shape.attn_l2_norm else 0)  # k has no bias; scale_mul has H
    mlp = C * M + M + M * C + C
    blocks = d * (attention + mlp)
    linear = 6 * C * C + 6 * C
    adaln = linear + d * 6 * C if shape.shared_aln else d * linear
    head = 2 * C * C + 2 * C + C * shape.vocab_size + shape.vocab_size
    rows = 1 + shape.length + (shape.latent_channels + 1) + (shape.num_classes + 1) + len(shape.patch_nums)
    embeddings = rows * C
    per_token = d * (4 * C * C + 2 * C * M)
    paper = per_token + (0 if shape.shared_aln else d * 6 * C * C)
    return ParamCount(blocks + adaln + head + embeddings, blocks, adaln, head, embeddings, paper, per_token)
