"""The output projection and its cross-entropy as one operator."""

from var_kernels.cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
