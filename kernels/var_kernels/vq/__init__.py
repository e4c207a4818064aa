"""The nearest-code search of a vector quantiser."""

from var_kernels.vq.op import nearest_code

__all__ = ["nearest_code"]
