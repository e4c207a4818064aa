"""The two-layer MLP."""

from var_kernels.mlp.op import mlp

__all__ = ["mlp"]
