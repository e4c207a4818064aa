"""The definition of the operator in plain PyTorch, for any dtype.

Half precision is computed in float32, and float64 stays float64.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return gelu(x W1^T + b1) W2^T + b2 with the tanh form of GELU.

    It is the FFN of the reference model.
    """
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
