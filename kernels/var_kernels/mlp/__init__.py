"""The two-layer MLP as one operator."""

from var_kernels.mlp.op import gelu_mlp

__all__ = ["gelu_mlp"]
