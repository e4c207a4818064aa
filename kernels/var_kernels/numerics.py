"""Functions that the references of all operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return x in at least float32: half precision becomes float32, and float64 stays float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
