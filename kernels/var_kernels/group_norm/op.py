"""The public function: group norm with SiLU, for decoding, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from var_kernels.dispatch import launches, multiprocessors, require, use_triton
from var_kernels.group_norm import config, reference


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Return silu(group_norm(x)), or the norm alone if `silu` is not set.

    The result (B, C, H, W) has the type and memory format of x and is computed in float32. The
    Triton kernels run where x is channels-last on a GPU and has at most 1024 channels. PyTorch
    would convert such a map to another memory order and back.

    Raises RuntimeError if a gradient is required.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_BCHW, weight_C, bias_C)):
        raise RuntimeError(
            "group_norm_silu has no gradient; call it under torch.no_grad(), or use "
            "torch.nn.functional.group_norm"
        )
    require(x_BCHW.ndim == 4, "group_norm_silu: x must be (B, C, H, W), not {}", x_BCHW.shape)
    C = x_BCHW.shape[1]
    require(C % groups == 0, "group_norm_silu: {} channels do not divide into {} groups", C, groups)
    fit = weight_C.shape == bias_C.shape == (C,)
    require(
        fit,
        "group_norm_silu: weight and bias must be ({},), not {} and {}",
        C,
        weight_C.shape,
        bias_C.shape,
    )
    last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    if not use_triton(x_BCHW) or not last or C > config.MAX_C or torch.compiler.is_compiling():
        return reference.group_norm(x_BCHW, weight_C, bias_C, groups, eps, silu)
    return launch(x_BCHW, weight_C, bias_C, groups, eps, silu)


@launches
def launch(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Launch the Triton kernels; x (B, C, H, W) is channels-last."""
    from var_kernels.group_norm import triton as kernels

    B, C, H, W = x.shape
    rows, block_c = H * W, 1 << (C - 1).bit_length()
    R = max(1, config.TILE // block_c)
    splits = config.splits(B, rows, R, multiprocessors(x.device))
    group = -(-rows // splits)
    partial = torch.empty(B, splits, 2, C, dtype=torch.float32, device=x.device)
    affine = torch.empty(B, 2, C, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    kernels.sums[(splits, B)](
        x=x,
        partial=partial,
        rows=rows,
        C=C,
        group=group,
        R=R,
        BLOCK_C=block_c,
        num_warps=config.WARPS,
    )
    width = C // groups
    kernels.finish[(groups, B)](
        x=x,
        partial=partial,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        affine=affine,
        rows=rows,
        C=C,
        splits=splits,
        width=width,
        eps=eps,
        BLOCK_S=1 << (splits - 1).bit_length(),
        BLOCK_W=1 << (width - 1).bit_length(),
        num_warps=4,
    )
    kernels.apply[(-(-rows // R), B)](
        x=x,
        affine=affine,
        y=y,
        rows=rows,
        C=C,
        SILU=silu,
        R=R,
        BLOCK_C=block_c,
        num_warps=config.WARPS,
    )
    return y
