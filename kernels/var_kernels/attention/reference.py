"""The definition of the operator in plain PyTorch, for any dtype: half precision is computed in
float32, float64 stays float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels.attention.schedule import Visible, mask
from var_kernels.numerics import upcast

MAX_LOG_SCALE = math.log(100)


def normalised(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, log_scale_H: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q/|q| exp(min(s_h, ln 100)) and k/|k| in the dtype of v, in which a cache holds them, and v.

    Without `log_scale_H` all three are returned as they are.
    """
    if log_scale_H is None:
        return q_BLHD, k_BLHD, v_BLHD
    q, k = (F.normalize(upcast(t), dim=-1) for t in (q_BLHD, k_BLHD))
    q = q * log_scale_H.to(q.dtype).clamp_max(MAX_LOG_SCALE).exp().view(1, 1, -1, 1)
    return q.to(v_BLHD.dtype), k.to(v_BLHD.dtype), v_BLHD


def attention(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    visible: Visible,
    log_scale_H: Tensor | None,
    sm_scale: float,
) -> Tensor:
    """softmax(q k^T) v over the visible keys, (B, L, H, D) in the dtype of v.

    With `log_scale_H` q <- q/|q| exp(min(s_h, ln 100)) and k <- k/|k|, without another scale;
    without it q k^T is multiplied by `sm_scale`.
    """
    q_BHLD, k_BHLD, v_BHLD = (
        t.transpose(1, 2)
        for t in normalised(upcast(q_BLHD), upcast(k_BLHD), upcast(v_BLHD), log_scale_H)
    )
    scores = (q_BHLD @ k_BHLD.transpose(2, 3)) * (sm_scale if log_scale_H is None else 1.0)
    scores = scores.masked_fill(~mask(visible, scores.device), -math.inf)
    return (scores.softmax(-1) @ v_BHLD).transpose(1, 2).to(v_BLHD.dtype)


def backward(
    do_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    visible: Visible,
    log_scale_H: Tensor | None,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of q, k, v packed (B, L, 3, H, D) and of `log_scale_H` (H,).

    They are written out, because autograd does not work inside an operator.
    """
    q, k, v, do = (upcast(t).transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD, do_BLHD))
    factor_H11 = sm_scale * torch.ones(q.shape[1], 1, 1, dtype=q.dtype, device=q.device)
    q_size, k_size = (
        t.norm(dim=-1, keepdim=True).clamp_min(1e-12) if log_scale_H is not None else 1.0
        for t in (q, k)
    )
    if log_scale_H is not None:
        factor_H11 = log_scale_H.to(q.dtype).clamp_max(MAX_LOG_SCALE).exp().view(-1, 1, 1)
    q_unit, k_unit = q / q_size, k / k_size
    scores = (q_unit @ k_unit.transpose(2, 3)) * factor_H11
    p = scores.masked_fill(~mask(visible, q.device), -math.inf).softmax(-1)
    dp = do @ v.transpose(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dk = ds @ k_unit * factor_H11, ds.transpose(2, 3) @ q_unit * factor_H11
    dscale_H = (ds * scores.masked_fill(~mask(visible, q.device), 0.0)).sum((0, 2, 3))
    if log_scale_H is not None:
        dq, dk = (
            (d - u * (u * d).sum(-1, keepdim=True)) / size
            for d, u, size in ((dq, q_unit, q_size), (dk, k_unit, k_size))
        )
        dscale_H = torch.where(log_scale_H < MAX_LOG_SCALE, dscale_H, 0.0).to(log_scale_H.dtype)
    packed = torch.stack([dq, dk, p.transpose(2, 3) @ do], dim=2).permute(0, 3, 2, 1, 4)
    return packed.contiguous().to(v_BLHD.dtype), dscale_H
