"""Attention over a scale schedule."""

from var_kernels.attention.op import append_to_cache, block_attention, cached_attention
from var_kernels.attention.schedule import Visible, mask, scales

__all__ = ["Visible", "append_to_cache", "block_attention", "cached_attention", "mask", "scales"]
