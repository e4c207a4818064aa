"""The definition of the operator in plain PyTorch, for any dtype.

Half precision is computed in float32, and float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from var_kernels.numerics import upcast


def row(v: Tensor) -> Tensor:
    """Return a condition vector (B, C) or (B, 1, C) as (B, 1, C) in at least float32."""
    return upcast(v).unsqueeze(1) if v.ndim == 2 else upcast(v)


def gate_residual(x_BLC: Tensor, y_BLC: Tensor, gamma_BC: Tensor, keep_B: Tensor | None) -> Tensor:
    """Return x + keep gamma y in the dtype of x.

    `keep_B` is 0 or 1 / (1 - rate) per sample, and None means 1.
    """
    gated = row(gamma_BC) * upcast(y_BLC)
    if keep_B is not None:
        gated = gated * upcast(keep_B).view(-1, 1, 1)
    return (upcast(x_BLC) + gated).to(x_BLC.dtype)


def adaln(
    x_BLC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return LN(x) (1 + scale) + shift.

    LN normalises over C without weights and uses the biased variance.
    """
    x = upcast(x_BLC)
    centred = x - x.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normal * (1 + row(scale_BC)) + row(shift_BC)).to(out_dtype or x_BLC.dtype)
