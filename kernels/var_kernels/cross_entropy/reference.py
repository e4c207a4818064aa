"""The definition of the operator in plain PyTorch, for any dtype.

Half precision is computed in float32, and float64 stays float64.
"""

from __future__ import annotations

from torch import Tensor

from var_kernels.numerics import upcast


def cross_entropy(
    logits_NV: Tensor, target_N: Tensor, smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss with label smoothing, the cross-entropy without it, and the most likely code.

    All three are (N,). Among equal logits, the most likely code is the one with the lowest index.

    loss = (1 - s) (lse - z_t) + s (lse - mean z), like
    torch.nn.functional.cross_entropy(label_smoothing=s), plus z_loss lse^2, which keeps the logits
    from drifting (PaLM, section 5).
    """
    z_NV = upcast(logits_NV)
    lse_N = z_NV.logsumexp(-1)
    ce_N = lse_N - z_NV.gather(-1, target_N[:, None]).squeeze(-1)
    loss_N = (1 - smoothing) * ce_N + smoothing * (lse_N - z_NV.mean(-1)) if smoothing else ce_N
    loss_N = loss_N + z_loss * lse_N.square() if z_loss else loss_N
    return loss_N, ce_N.detach(), z_NV.argmax(-1)
