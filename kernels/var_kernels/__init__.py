"""Fused operators of VAR for NVIDIA GPUs, each with a PyTorch form that defines it."""

from var_kernels.adaln import adaln, gate_adaln
from var_kernels.attention import block_attention, cached_attention
from var_kernels.cross_entropy import linear_cross_entropy
from var_kernels.dispatch import use_triton, why_not
from var_kernels.mlp import mlp
from var_kernels.vq import nearest_code

__all__ = [
    "adaln", "block_attention", "cached_attention", "gate_adaln", "linear_cross_entropy", "mlp", "nearest_code", "use_triton", "why_not",
]  # fmt: skip
