"""The launches of the adaptive layer norm's kernels: sizes, strides and settings from tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from var_kernels.adaln.config import A_ROW_EACH, config_for, splits
from var_kernels.dispatch import launches, multiprocessors


@launches
def launch_forward(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the Triton forward pass: return (x', h, mean (B L,), rstd (B L,)).

    x' is empty without a gate.
    """
    from var_kernels.adaln import triton as kernels

    B, L, C = x.shape
    x, y, keep = (
        x.contiguous(),
        None if y is None else y.contiguous(),
        None if keep is None else keep.contiguous(),
    )
    h = torch.empty_like(x, dtype=out)
    x_new = x.new_empty(0) if y is None else torch.empty_like(x)
    mean, rstd = (torch.empty(B * L, dtype=torch.float32, device=x.device) for _ in range(2))
    settings = config_for(C, x.element_size())
    mine = settings.forward if y is None else settings.gated
    parts = splits(B, L, mine.programs * multiprocessors(x.device))
    kernels.forward[(parts, B)](
        x=x,
        y=y,
        gamma=gamma,
        keep=keep,
        scale=scale,
        shift=shift,
        x_new=x_new,
        h=h,
        mean=mean,
        rstd=rstd,
        L=L,
        C=C,
        rows=-(-L // parts),
        gamma_b=0 if gamma is None else gamma.stride(0),
        scale_b=scale.stride(0),
        shift_b=shift.stride(0),
        eps=eps,
        GATED=y is not None,
        KEEP=keep is not None,
        A_ROW_EACH=mine.programs == A_ROW_EACH,
        BLOCK_C=settings.block_c,
        STAGES=mine.stages,
        num_warps=mine.warps,
    )
    return x_new, h, mean, rstd


@launches
def launch_backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the Triton backward pass: return the gradients of x, y, gamma, scale, shift.

    The gradients of y and gamma are empty without a gate.
    """
    from var_kernels.adaln import triton as kernels

    B, L, C = x_new.shape
    gated = y is not None and gamma is not None
    dh, x_new = dh.contiguous(), x_new.contiguous()
    dx_new = None if dx_new is None else dx_new.contiguous()
    y, keep = None if y is None else y.contiguous(), None if keep is None else keep.contiguous()
    dx, dy = torch.empty_like(x_new), torch.empty_like(y) if y is not None else x_new.new_empty(0)
    settings = config_for(C, x_new.element_size())
    mine = settings.backward
    parts = splits(B, L, mine.programs * multiprocessors(x_new.device))
    partial = torch.empty(B, parts, 3, C, dtype=torch.float32, device=x_new.device)
    kernels.backward[(parts, B)](
        dh=dh,
        dx_new=dx_new,
        x_new=x_new,
        y=y,
        gamma=gamma,
        keep=keep,
        scale=scale,
        mean=mean,
        rstd=rstd,
        dx=dx,
        dy=dy,
        partial=partial,
        L=L,
        C=C,
        rows=-(-L // parts),
        gamma_b=0 if gamma is None else gamma.stride(0),
        scale_b=scale.stride(0),
        GATED=gated,
        KEEP=keep is not None,
        RESIDUAL=dx_new is not None,
        BLOCK_C=settings.block_c,
        STAGES=mine.stages,
        num_warps=mine.warps,
    )
    dscale = torch.empty(B, C, dtype=scale.dtype, device=scale.device)
    dshift = torch.empty(B, C, dtype=shift_dtype, device=scale.device)
    dgamma = (
        torch.empty(B, C, dtype=gamma.dtype, device=scale.device)
        if gamma is not None
        else scale.new_empty(0)
    )
    block = min(256, settings.block_c)
    kernels.finish[(-(-C // block), B)](
        partial=partial,
        dscale=dscale,
        dshift=dshift,
        dgamma=dgamma,
        C=C,
        splits=parts,
        GATED=gated,
        BLOCK=block,
        num_warps=4,
    )
    return dx, dy, dgamma, dscale, dshift
