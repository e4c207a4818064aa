"""The output projection with its cross-entropy."""

from var_kernels.cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
