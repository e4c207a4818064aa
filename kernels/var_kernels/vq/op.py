"""The public function: the nearest code of each vector.

It is not differentiable. The caller is responsible for the straight-through estimator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from var_kernels.dispatch import launches, require, use_triton
from var_kernels.vq import config, reference


def nearest_code(z_NZ: Tensor, codebook_VZ: Tensor, precision: str = "float32") -> Tensor:
    """Return the index of the nearest code of each vector, int64 (N,).

    Among equal codes, the lowest index is returned. `precision` is "float32" or "tf32". The
    official code runs in TF32 on NVIDIA GPUs, which gives a different code for a few vectors.
    """
    if precision not in config.PRECISIONS:
        raise ValueError(
            f"nearest_code: precision={precision!r} is not known; "
            f"use {' or '.join(config.PRECISIONS)}"
        )
    fit = z_NZ.ndim == codebook_VZ.ndim == 2 and z_NZ.shape[1] == codebook_VZ.shape[1]
    require(
        fit,
        "nearest_code: vectors (N, Z) and codes (V, Z) are needed, not {} and {}",
        z_NZ.shape,
        codebook_VZ.shape,
    )
    if not use_triton(z_NZ) or z_NZ.shape[1] > config.MAX_Z:
        return reference.nearest_code(z_NZ, codebook_VZ)
    return nearest_code_op(z_NZ.detach(), codebook_VZ.detach(), precision)


@launches
def launch(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    """Launch the Triton kernel of the search."""
    from var_kernels.vq import triton as kernels

    (N, Z), V = z.shape, codebook.shape[0]
    z = z if z.stride(1) == 1 else z.contiguous()
    codebook = codebook if codebook.stride(1) == 1 else codebook.contiguous()
    index = torch.empty(N, dtype=torch.int64, device=z.device)
    kernels.nearest_code[(-(-N // config.BLOCK_N),)](
        z=z,
        codes=codebook,
        squares=codebook.float().square().sum(1),
        index=index,
        N=N,
        V=V,
        Z=Z,
        z_stride=z.stride(0),
        code_stride=codebook.stride(0),
        BLOCK_N=config.BLOCK_N,
        BLOCK_V=config.BLOCK_V,
        BLOCK_Z=max(16, 1 << (Z - 1).bit_length()),
        PRECISION=config.PRECISIONS[precision],
        num_warps=config.WARPS,
    )
    return index


@torch.library.custom_op("var_kernels::nearest_code", mutates_args=(), device_types="cuda")
def nearest_code_op(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    """Compute `nearest_code` as one operator for torch.compile."""
    return launch(z, codebook, precision)


@nearest_code_op.register_kernel("cpu")
def _(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    return reference.nearest_code(z, codebook)


@nearest_code_op.register_fake
def _(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)
