"""The transformer block: self-attention and MLP between adaptive layer norms, with stochastic depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_scale.model.attention import BACKENDS, backend_name


def drop_path(x_BLC: Tensor, rate: float, keep_B: Tensor | None, training: bool) -> Tensor:
    """Zero a residual branch for whole samples and scale the others by 1 / (1 - rate).

    `keep_B` (B,) bool says which samples keep it; None draws them while training, and keeps all otherwise.
    """
    if keep_B is None:
        if not training or rate == 0:
            return x_BLC
        keep_B11 = x_BLC.new_empty(x_BLC.shape[0], 1, 1).bernoulli_(1 - rate)
    else:
        keep_B11 = keep_B.to(x_BLC.dtype).view(-1, 1, 1)
    return x_BLC * (keep_B11 / (1 - rate))


class DropPath(nn.Module):
    """`drop_path` with a fixed rate."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BLC: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Same shape in and out."""
        return drop_path(x_BLC, self.rate, keep_B, self.training)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"rate={self.rate:.4f}"


class KVCache:
    """Keys (after normalisation) and values of the scales already sampled, (B, H, L, D), for one block."""

    def __init__(self) -> None:
        self.k_BHLD: Tensor | None = None
        self.v_BHLD: Tensor | None = None

    def extend(self, k_BHlD: Tensor, v_BHlD: Tensor) -> tuple[Tensor, Tensor]:
        """Append and return everything so far."""
        self.k_BHLD = k_BHlD if self.k_BHLD is None else torch.cat((self.k_BHLD, k_BHlD), dim=2)
        self.v_BHLD = v_BHlD if self.v_BHLD is None else torch.cat((self.v_BHLD, v_BHlD), dim=2)
        return self.k_BHLD, self.v_BHLD


class BiasedLinear(nn.Linear):
    """A linear whose bias comes from the caller. As a module, so that engines which gather weights per module see its use."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, bias=False)

    def forward(self, x_BLC: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, inner) -> (B, L, outer)."""
        return F.linear(x_BLC, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    l2_norm: q <- q/|q| exp(min(s_h, ln 100)), k <- k/|k|, softmax scale 1. Otherwise the scale is 0.25 / sqrt(D).
    """

    zero_k_bias: Tensor
    max_log_scale = math.log(100)

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
        self.proj = nn.Linear(channels, channels)
        self.cache: KVCache | None = None

    def kv_caching(self, enable: bool) -> None:
        """Start with an empty key-value cache, or drop it. While it is on, queries also see the keys of all earlier calls."""
        self.cache = KVCache() if enable else None

    def forward(self, x_BLC: Tensor, attn_bias: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, C). `attn_bias` (1, 1, L, L) or None."""
        B, L, C = x_BLC.shape
        qkv_BLC3 = self.mat_qkv(x_BLC, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        qkv_3BHLD = qkv_BLC3.view(B, L, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q_BHLD, k_BHLD, v_BHLD = qkv_3BHLD.unbind(0)
        if self.l2_norm:
            # Under autocast the norm promotes to float32; the product runs in the dtype of v.
            q_BHLD, k_BHLD = F.normalize(qkv_3BHLD[:2], dim=-1).unbind(0)
            q_BHLD = (q_BHLD * self.scale_mul_1H11.clamp_max(self.max_log_scale).exp()).to(v_BHLD.dtype)
            k_BHLD = k_BHLD.to(v_BHLD.dtype)
        if self.cache is not None:
            k_BHLD, v_BHLD = self.cache.extend(k_BHLD, v_BHLD)
        o_BHLD = BACKENDS[self.backend](q_BHLD, k_BHLD, v_BHLD, attn_bias, self.scale)
        return self.proj(o_BHLD.transpose(1, 2).reshape(B, L, C))

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"heads={self.heads}, l2_norm={self.l2_norm}, attention={self.backend}"


class FFN(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.fc2(F.gelu(self.fc1(x_BLC), approximate="tanh"))


def modulate(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x_BLC * (scale_B1C + 1) + shift_B1C


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
    ) -> None:
        super().__init__()
        self.C, self.shared_aln = channels, shared_aln
        self.drop_path = DropPath(drop_path_rate)
        self.attn = SelfAttention(channels, heads, attn_l2_norm, attention)
        self.ffn = FFN(channels, round(channels * mlp_ratio))
        self.ln_wo_grad = nn.LayerNorm(channels, eps=norm_eps, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, channels) / channels**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """x (B, L, C) -> (B, L, C); the first three names are the official ones.

        `cond_BD` is the condition (B, C), or with shared AdaLN the model's (B, 1, 6, C). `keep` says which samples keep the branches
        of this block: (B,) for both, (2, B) for attention and MLP; None draws it while training.
        """
        ada_B16C = cond_BD + self.ada_gss if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16C.unbind(2)
        keep_attn, keep_ffn = (keep, keep) if keep is None or keep.ndim == 1 else keep.unbind(0)
        h_BLC = self.attn(modulate(self.ln_wo_grad(x), scale1, shift1), attn_bias)
        x = x + self.drop_path(h_BLC * gamma1, keep_attn)
        h_BLC = self.ffn(modulate(self.ln_wo_grad(x), scale2, shift2))
        return x + self.drop_path(h_BLC * gamma2, keep_ffn)


class AdaLNBeforeHead(nn.Module):
    """LN(x)(1+scale)+shift with scale, shift from the condition."""

    def __init__(self, channels: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.C = channels
        self.ln_wo_grad = nn.LayerNorm(channels, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        scale_B1C, shift_B1C = self.ada_lin(cond_BC).view(-1, 1, 2, self.C).unbind(2)
        return modulate(self.ln_wo_grad(x_BLC), scale_B1C, shift_B1C)
