"""The definition of the operator in plain PyTorch, for any dtype.

Half precision is computed in float32, and float64 stays float64.
"""

from __future__ import annotations

from torch import Tensor

from var_kernels.numerics import upcast


def nearest_code(z_NZ: Tensor, codebook_VZ: Tensor) -> Tensor:
    """Return the index (N,) of the code with the smallest |c|^2 - 2 z c, which is the nearest code.

    Among equal codes, the lowest index is returned.
    """
    z, c = upcast(z_NZ), upcast(codebook_VZ)
    return (c.square().sum(1) - 2 * z @ c.t()).argmin(1)
