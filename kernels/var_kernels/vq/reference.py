"""The definition of the operator, in plain PyTorch of any dtype: half precision is computed in float32, float64 stays float64."""

from __future__ import annotations

from torch import Tensor

from var_kernels.numerics import upcast


def nearest_code(z_NZ: Tensor, codebook_VZ: Tensor) -> Tensor:
    """Index (N,) of the code with the smallest |c|^2 - 2 z c, which is the nearest; the lowest index among equals."""
    z, c = upcast(z_NZ), upcast(codebook_VZ)
    return (c.square().sum(1) - 2 * z @ c.t()).argmin(1)
