"""The definition of the operator in plain PyTorch, for any dtype.

Half precision is computed in float32, and float64 stays float64.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from var_kernels.numerics import upcast


def group_norm(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Apply the group norm and, if `silu` is set, SiLU; return the result in the type of x."""
    x = upcast(x_BCHW)
    y = F.group_norm(x, groups, weight_C.to(x.dtype), bias_C.to(x.dtype), eps)
    return (F.silu(y) if silu else y).to(x_BCHW.dtype)
