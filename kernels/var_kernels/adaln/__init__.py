"""Gated residual and adaptive layer norm."""

from var_kernels.adaln.op import adaln, gate_adaln

__all__ = ["adaln", "gate_adaln"]
