"""Fused operators of VAR for NVIDIA GPUs. Each has a PyTorch form that defines it."""

from var_kernels.adaln import adaptive_layer_norm, gate_adaptive_layer_norm
from var_kernels.attention import append_to_cache, block_attention, cached_attention
from var_kernels.cross_entropy import linear_cross_entropy
from var_kernels.dispatch import use_triton, why_not
from var_kernels.group_norm import group_norm_silu
from var_kernels.mlp import gelu_mlp
from var_kernels.vq import nearest_code

__all__ = [
    "adaptive_layer_norm",
    "append_to_cache",
    "block_attention",
    "cached_attention",
    "gate_adaptive_layer_norm",
    "gelu_mlp",
    "group_norm_silu",
    "linear_cross_entropy",
    "nearest_code",
    "use_triton",
    "why_not",
]
