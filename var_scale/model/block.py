"""The transformer block: self-attention and MLP between adaptive layer norms, with stochastic depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_kernels import adaptive_layer_norm, gate_adaptive_layer_norm, gelu_mlp, use_triton
from var_kernels.dispatch import compute_dtype
from var_scale.model.attention import KVCache, ScaleMask, attend, backend_name
from var_scale.model.linear import Linear, linear

KERNELS = ("auto", "on", "off")
Pending = tuple[Tensor, Tensor, Tensor | None]
"""a branch that is not added yet: its output (B, L, C), its gate (B, 1, C), and the factor of each sample (B,) or None"""


def fused(kernels: str, x: Tensor) -> bool:
    """Whether the fused operators take over for `x`. on: also where they run in their PyTorch form."""
    return kernels == "on" or (kernels == "auto" and use_triton(x))


def keep_factor(x_BLC: Tensor, rate: float, keep_B: Tensor | None, training: bool) -> Tensor | None:
    """The factor (B,) of a residual branch for each sample, 0 or 1 / (1 - rate); None where all stay as they are.

    `keep_B` (B,) bool says which samples keep it; None draws them while training, and keeps all otherwise.
    """
    if keep_B is None:
        if not training or rate == 0:
            return None
        return x_BLC.new_empty(x_BLC.shape[0]).bernoulli_(1 - rate) / (1 - rate)
    return keep_B.to(x_BLC.dtype) / (1 - rate)


def drop_path(x_BLC: Tensor, rate: float, keep_B: Tensor | None, training: bool) -> Tensor:
    """Zero a residual branch for whole samples and scale the others by 1 / (1 - rate); see `keep_factor`."""
    factor_B = keep_factor(x_BLC, rate, keep_B, training)
    return x_BLC if factor_B is None else x_BLC * factor_B.view(-1, 1, 1)


class DropPath(nn.Module):
    """`drop_path` with a fixed rate."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BLC: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Same shape in and out."""
        return drop_path(x_BLC, self.rate, keep_B, self.training)

    def factor(self, x_BLC: Tensor, keep_B: Tensor | None) -> Tensor | None:
        """The factor (B,) of each sample, for operators that apply it themselves."""
        return keep_factor(x_BLC, self.rate, keep_B, self.training)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"rate={self.rate:.4f}"


class BiasedLinear(nn.Linear):
    """A linear whose bias comes from the caller. As a module, so that engines which gather weights per module see its use."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, bias=False)

    def forward(self, x_BLC: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, inner) -> (B, L, outer)."""
        return linear(x_BLC, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    l2_norm: q <- q/|q| exp(min(s_h, ln 100)), k <- k/|k|, softmax scale 1. Otherwise the scale is 0.25 / sqrt(D).
    """

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
        """Start with an empty key-value cache, with room for `capacity` tokens from the start, or drop it. While it is on, queries also see
        the keys of all earlier calls."""
        self.cache = KVCache(capacity) if enable else None

    def forward(self, x_BLC: Tensor, attn_bias: Tensor | ScaleMask | None) -> Tensor:
        """(B, L, C) -> (B, L, C). `attn_bias`: the model's mask, a tensor (1, 1, L, L), or None."""
        B, L, _ = x_BLC.shape
        qkv_BLC3 = self.mat_qkv(x_BLC, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        qkv_BL3HD = qkv_BLC3.view(B, L, 3, self.heads, self.head_dim)
        log_scale_H = self.scale_mul_1H11.view(-1) if self.l2_norm else None
        return self.proj(attend(qkv_BL3HD, attn_bias, log_scale_H, self.scale, self.backend, self.cache))

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"heads={self.heads}, l2_norm={self.l2_norm}, attention={self.backend}"


class FFN(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, channels: int, hidden: int, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels, self.recompute = kernels, False
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C). The fused form reads the weights of both layers here: ZeRO-3 must gather this module as a whole."""
        if fused(self.kernels, x_BLC):
            save = "input" if self.recompute else "preact"
            return gelu_mlp(x_BLC, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, save)
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._plain, x_BLC, use_reentrant=False)
        return self._plain(x_BLC)

    def _plain(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(self.fc1(x_BLC, gelu=True))


def like_weight(x_BLC: Tensor, weight: Tensor) -> Tensor:
    """For weights in half precision, as sampling may have them, their dtype; under autocast as it is."""
    return x_BLC if x_BLC.dtype == weight.dtype or torch.is_autocast_enabled(x_BLC.device.type) else x_BLC.to(weight.dtype)


def modulate(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x_BLC * (scale_B1C + 1) + shift_B1C


def norm_after(
    x_BLC: Tensor, pending: Pending | None, scale_B1C: Tensor, shift_B1C: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add the pending branch to x, then AdaLN: (h, x)."""
    if pending is None:
        return adaptive_layer_norm(x_BLC, scale_B1C, shift_B1C, eps, out_dtype), x_BLC
    y_BLC, gamma_B1C, keep_B = pending
    x_BLC, h_BLC = gate_adaptive_layer_norm(x_BLC, y_BLC, gamma_B1C, scale_B1C, shift_B1C, keep_B, eps, out_dtype)
    return h_BLC, x_BLC


class AdaLNSelfAttn(nn.Module):
    """x <- x + DP(Attn(LN(x)(1+scale1)+shift1) gamma1); x <- x + DP(FFN(LN(x)(1+scale2)+shift2) gamma2).

    The six vectors come from the block's own linear on the condition, or, with `shared_aln`, from the model's linear plus `ada_gss`.
    Their order is gamma1, gamma2, scale1, scale2, shift1, shift2.
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
        """The six vectors (B, 1, 6, C) of this block."""
        return cond_BD + self.ada_gss if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)

    def forward(
        self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | ScaleMask | None = None, keep: Tensor | None = None,
        pending: Pending | None = None, defer: bool = False, ada_B16C: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Pending]:  # fmt: skip
        """x (B, L, C) -> (B, L, C); the first three names are the official ones.

        `cond_BD` is the condition (B, C), or with shared AdaLN the model's (B, 1, 6, C). `keep` says which samples keep the branches
        of this block: (B,) for both, (2, B) for attention and MLP; None draws it while training. With `defer` the MLP's branch is
        returned beside x, not added, and `pending` is that of the block before: gate, sum and the next norm are one pass over memory.
        `ada_B16C`: what `conditioning` made of `cond_BD` before.
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
        h_BLC = self.attn(like_weight(modulate(self.ln_wo_grad(x), scale1, shift1), self.attn.proj.weight), attn_bias)
        x = x + self.drop_path(h_BLC * gamma1, keep_attn)
        h_BLC = self.ffn(like_weight(modulate(self.ln_wo_grad(x), scale2, shift2), self.attn.proj.weight))
        return x + self.drop_path(h_BLC * gamma2, keep_ffn)


class AdaLNBeforeHead(nn.Module):
    """LN(x)(1+scale)+shift with scale, shift from the condition."""

    def __init__(self, channels: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.C = channels
        self.ln_wo_grad = nn.LayerNorm(channels, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x_BLC: Tensor, cond_BC: Tensor, pending: Pending | None = None, defer: bool = False) -> Tensor:
        """(B, L, C) -> (B, L, C), in the compute dtype with `defer`, which adds the last block's branch first."""
        scale_B1C, shift_B1C = self.ada_lin(cond_BC).view(-1, 1, 2, self.C).unbind(2)
        if defer:
            out = compute_dtype(self.ada_lin.get_parameter("1.weight"))
            return norm_after(x_BLC, pending, scale_B1C, shift_B1C, self.ln_wo_grad.eps, out)[0]
        return modulate(self.ln_wo_grad(x_BLC), scale_B1C, shift_B1C)
