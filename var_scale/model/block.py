"""The transformer block: self-attention and MLP with adaptive layer norms and stochastic depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_kernels import adaptive_layer_norm, gate_adaptive_layer_norm, gelu_mlp, use_triton
from var_kernels.dispatch import compute_dtype
from var_scale.model.attention import KVCache, ScaleMask, attend, backend_name
from var_scale.model.cpu import Linear, linear

KERNELS = ("auto", "on", "off")
Pending = tuple[Tensor, Tensor, Tensor | None]
"""a residual branch that is not added yet: its output (B, L, C), its gate (B, 1, C), and the factor
(B,) of each sample or None. The next norm adds it in its own pass over memory."""


def fused(kernels: str, x: Tensor) -> bool:
    """Whether the fused operators compute `x`. With `on` also where they have only their PyTorch
    form."""
    return kernels == "on" or (kernels == "auto" and use_triton(x))


def keep_factor(x_BLC: Tensor, rate: float, keep_B: Tensor | None, training: bool) -> Tensor | None:
    """The factor (B,) of a residual branch for each sample: 0 or 1 / (1 - rate). None means 1.

    `keep_B` (B,) bool: the samples that keep the branch; None draws them in training, and keeps all
    otherwise.
    """
    if keep_B is None:
        if not training or rate == 0:
            return None
        return x_BLC.new_empty(x_BLC.shape[0]).bernoulli_(1 - rate) / (1 - rate)
    return keep_B.to(x_BLC.dtype) / (1 - rate)


def drop_path(x_BLC: Tensor, rate: float, keep_B: Tensor | None, training: bool) -> Tensor:
    """A residual branch times its `keep_factor`: zero for some samples, larger for the others."""
    factor_B = keep_factor(x_BLC, rate, keep_B, training)
    return x_BLC if factor_B is None else x_BLC * factor_B.view(-1, 1, 1)


class DropPath(nn.Module):
    """`drop_path` with a fixed rate."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BLC: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return drop_path(x_BLC, self.rate, keep_B, self.training)

    def factor(self, x_BLC: Tensor, keep_B: Tensor | None) -> Tensor | None:
        """`keep_factor` with this rate, for operators that apply it themselves."""
        return keep_factor(x_BLC, self.rate, keep_B, self.training)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


class BiasedLinear(nn.Linear):
    """A linear whose bias comes from the caller. It is a module, so that engines that gather
    weights per module notice its use."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, bias=False)

    def forward(self, x_BLC: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, inner) -> (B, L, outer)."""
        return linear(x_BLC, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention. With `l2_norm` q <- q/|q| exp(min(s_h, ln 100)), k <- k/|k| and
    the softmax scale is 1; without it the scale is 0.25 / sqrt(D)."""

    zero_k_bias: Tensor

    def __init__(self, channels: int, heads: int, l2_norm: bool, attention: str = "auto") -> None:
        super().__init__()
        self.heads, self.head_dim, self.l2_norm = heads, channels // heads, l2_norm
        self.backend = backend_name(attention)
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(self.head_dim)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("zero_k_bias", torch.zeros(channels))
        self.mat_qkv = BiasedLinear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.cache: KVCache | None = None

    def kv_caching(self, enable: bool, capacity: int = 0) -> None:
        """Start with an empty key-value cache for `capacity` tokens, or drop the cache. With a
        cache the queries also see the keys of all earlier calls."""
        self.cache = KVCache(capacity) if enable else None

    def forward(self, x_BLC: Tensor, attn_bias: Tensor | ScaleMask | None) -> Tensor:
        """(B, L, C) -> (B, L, C). `attn_bias`: the model's mask, a tensor (1, 1, L, L), or None."""
        B, L, _ = x_BLC.shape
        qkv_BLC3 = self.mat_qkv(x_BLC, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        qkv_BL3HD = qkv_BLC3.view(B, L, 3, self.heads, self.head_dim)
        log_scale_H = self.scale_mul_1H11.view(-1) if self.l2_norm else None
        return self.proj(
            attend(qkv_BL3HD, attn_bias, log_scale_H, self.scale, self.backend, self.cache)
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, l2_norm={self.l2_norm}, attention={self.backend}"


class FFN(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, channels: int, hidden: int, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels, self.recompute = kernels, False
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C). The fused form reads the weights of both layers here, without
        calling them, so ZeRO-3 must gather this module as a whole."""
        if fused(self.kernels, x_BLC):
            save = "input" if self.recompute else "preact"
            return gelu_mlp(
                x_BLC, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, save
            )
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._plain, x_BLC, use_reentrant=False)
        return self._plain(x_BLC)

    def _plain(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(self.fc1(x_BLC, gelu=True))


def like_weight(x_BLC: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype of a weight, which may be half precision in sampling. Autocast chooses the
    dtype itself, so x stays as it is there."""
    if torch.is_autocast_enabled(x_BLC.device.type):
        return x_BLC
    return x_BLC.to(weight.dtype)


def modulate(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x_BLC * (scale_B1C + 1) + shift_B1C


def norm_after(
    x_BLC: Tensor,
    pending: Pending | None,
    scale_B1C: Tensor,
    shift_B1C: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add the pending branch to x, then AdaLN of the sum: returns h and the new x."""
    if pending is None:
        return adaptive_layer_norm(x_BLC, scale_B1C, shift_B1C, eps, out_dtype), x_BLC
    y_BLC, gamma_B1C, keep_B = pending
    x_BLC, h_BLC = gate_adaptive_layer_norm(
        x_BLC, y_BLC, gamma_B1C, scale_B1C, shift_B1C, keep_B, eps, out_dtype
    )
    return h_BLC, x_BLC


class AdaLNSelfAttn(nn.Module):
    """The official block with adaptive layer norm:

        x <- x + DP(Attn(LN(x) (1 + scale1) + shift1) gamma1)
        x <- x + DP(FFN(LN(x) (1 + scale2) + shift2) gamma2)

    DP is drop-path. The six vectors come from the block's own linear of the condition, or with
    `shared_aln` from the model's linear plus `ada_gss`. Their order is gamma1, gamma2, scale1,
    scale2, shift1, shift2.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        attention: str = "auto",
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.C, self.shared_aln, self.kernels, self.recompute = channels, shared_aln, kernels, False
        self.drop_path = DropPath(drop_path_rate)
        self.attn = SelfAttention(channels, heads, attn_l2_norm, attention)
        self.ffn = FFN(channels, round(channels * mlp_ratio), kernels)
        self.ln_wo_grad = nn.LayerNorm(channels, eps=norm_eps, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, channels) / channels**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def conditioning(self, cond_BD: Tensor) -> Tensor:
        """The six vectors (B, 1, 6, C) of this block; `cond_BD` as in `forward`."""
        if self.shared_aln:
            return cond_BD + self.ada_gss
        return self.ada_lin(cond_BD).view(-1, 1, 6, self.C)

    def forward(
        self,
        x: Tensor,
        cond_BD: Tensor,
        attn_bias: Tensor | ScaleMask | None = None,
        keep: Tensor | None = None,
        pending: Pending | None = None,
        defer: bool = False,
        ada_B16C: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Pending]:
        """x (B, L, C) -> (B, L, C). The names of the first three arguments are the official ones.

        Args:
            x: the residual stream.
            cond_BD: the condition (B, C), or with shared AdaLN the model's (B, 1, 6, C).
            attn_bias: the model's mask, a bias (1, 1, L, L), or None.
            keep: bool, the samples that keep the branches of this block: (B,) for both, (2, B) for
                attention and MLP; None draws them in training.
            pending: the branch of the block before, with `defer`.
            defer: return the branch of the MLP beside x instead of adding it: gate, sum and the
                next norm are then one pass over memory.
            ada_B16C: the result of `conditioning`, if it is known already.
        """
        ada_B16C = self.conditioning(cond_BD) if ada_B16C is None else ada_B16C
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16C.unbind(2)
        keep_attn, keep_ffn = (keep, keep) if keep is None or keep.ndim == 1 else keep.unbind(0)
        if defer:
            out = compute_dtype(self.attn.proj.weight)
            h_BLC, x = norm_after(x, pending, scale1, shift1, self.ln_wo_grad.eps, out)
            branch = (self.attn(h_BLC, attn_bias), gamma1, self.drop_path.factor(x, keep_attn))
            h_BLC, x = norm_after(x, branch, scale2, shift2, self.ln_wo_grad.eps, out)
            return x, (self.ffn(h_BLC), gamma2, self.drop_path.factor(x, keep_ffn))
        h_BLC = self.attn(
            like_weight(modulate(self.ln_wo_grad(x), scale1, shift1), self.attn.proj.weight),
            attn_bias,
        )
        x = x + self.drop_path(h_BLC * gamma1, keep_attn)
        h_BLC = self.ffn(
            like_weight(modulate(self.ln_wo_grad(x), scale2, shift2), self.attn.proj.weight)
        )
        return x + self.drop_path(h_BLC * gamma2, keep_ffn)


class AdaLNBeforeHead(nn.Module):
    """LN(x) (1 + scale) + shift with scale and shift from the condition."""

    def __init__(self, channels: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.C = channels
        self.ln_wo_grad = nn.LayerNorm(channels, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(
        self, x_BLC: Tensor, cond_BC: Tensor, pending: Pending | None = None, defer: bool = False
    ) -> Tensor:
        """(B, L, C) -> (B, L, C); `defer` adds the last branch and returns the compute dtype."""
        scale_B1C, shift_B1C = self.ada_lin(cond_BC).view(-1, 1, 2, self.C).unbind(2)
        if defer:
            out = compute_dtype(self.ada_lin.get_parameter("1.weight"))
            return norm_after(x_BLC, pending, scale_B1C, shift_B1C, self.ln_wo_grad.eps, out)[0]
        return modulate(self.ln_wo_grad(x_BLC), scale_B1C, shift_B1C)
