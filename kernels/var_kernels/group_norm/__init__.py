"""Group norm and SiLU of channels-last maps as one operator."""

from var_kernels.group_norm.op import group_norm_silu

__all__ = ["group_norm_silu"]
