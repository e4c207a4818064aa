"""The gated residual and the adaptive layer norm as one operator."""

from var_kernels.adaln.op import adaptive_layer_norm, gate_adaptive_layer_norm

__all__ = ["adaptive_layer_norm", "gate_adaptive_layer_norm"]
