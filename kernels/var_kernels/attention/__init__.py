"""Attention over a scale schedule."""

from var_kernels.attention.op import block_attention, cached_attention
from var_kernels.attention.schedule import Visible, mask, scales

__all__ = ["Visible", "block_attention", "cached_attention", "mask", "scales"]
