"""Exact number of trainable parameters of a VAR transformer, without buffers."""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.cost.shape import ModelShape


@dataclass(frozen=True)
class ParamCount:
    """Parameters of one model; total = blocks + adaln + head + embeddings."""

    total: int
    blocks: int
    """attention and MLP of all blocks: d (4 C^2 + 2 C M + ...), with MLP width M"""
    adaln: int
    """AdaLN layers of the blocks: d (6 C^2 + 6 C), or one shared layer and d offsets of 6 C"""
    head: int
    """head_nm (2 C^2 + 2 C) and head (C V + V)"""
    embeddings: int
    """class, position, start and scale embeddings, and the input projection"""
    paper: int
    """the paper's N, matrices of attention, MLP and AdaLN only: 18 d C^2, or 12 d C^2 if shared"""
    per_token: int
    """weights that act on every token, 12 d C^2: AdaLN layers act once per image"""


def count_params(shape: ModelShape) -> ParamCount:
    """Count trainable parameters by group. The official d16 at 256 pixels has 310,283,520."""
    C, M, d = shape.width, shape.mlp_hidden, shape.depth
    # q and v have biases and k has none. With attn_l2_norm every head has a learned scale.
    attention = 3 * C * C + 2 * C + C * C + C + (shape.heads if shape.attn_l2_norm else 0)
    mlp = C * M + M + M * C + C
    blocks = d * (attention + mlp)
    linear = 6 * C * C + 6 * C
    adaln = linear + d * 6 * C if shape.shared_aln else d * linear
    head = 2 * C * C + 2 * C + C * shape.vocab_size + shape.vocab_size
    rows = (
        1
        + shape.length
        + (shape.latent_channels + 1)
        + (shape.num_classes + 1)
        + len(shape.patch_nums)
    )
    embeddings = rows * C
    per_token = d * (4 * C * C + 2 * C * M)
    paper = per_token + (0 if shape.shared_aln else d * 6 * C * C)
    return ParamCount(
        blocks + adaln + head + embeddings, blocks, adaln, head, embeddings, paper, per_token
    )
