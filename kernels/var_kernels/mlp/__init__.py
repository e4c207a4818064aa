"""The two-layer MLP."""

from var_kernels.mlp.op import gelu_mlp

__all__ = ["gelu_mlp"]
