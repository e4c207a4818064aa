"""The encoders and decoders of the VQVAE: the official CNN, and small networks on patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_kernels import group_norm_silu
from var_scale.model.cpu import convolve_doubled


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with the epsilon of latent diffusion."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def normed(norm: nn.GroupNorm, x_BChw: Tensor, silu: bool = True) -> Tensor:
    """The norm, and with `silu` SiLU of it. On a GPU without gradients this is the operator of
    var_kernels: one kernel where x lies channels-last."""
    if not torch.is_grad_enabled() and x_BChw.is_cuda and not torch.is_autocast_enabled("cuda"):
        return group_norm_silu(x_BChw, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return F.silu(norm(x_BChw), inplace=not torch.is_grad_enabled()) if silu else norm(x_BChw)


def to_pixels(conv: nn.Conv2d, x_BChw: Tensor) -> Tensor:
    """The last convolution.

    In half precision on a GPU its three output channels are padded to eight, for which tensor cores
    have a kernel: with 3 channels it took 25 of the 122 ms of a decoder at 64 images on an H200.
    """
    if not x_BChw.is_cuda or x_BChw.dtype == torch.float32 or torch.is_grad_enabled():
        return conv(x_BChw)
    more = -conv.out_channels % 8
    assert conv.bias is not None and isinstance(conv.padding, tuple)
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, more))
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = F.pad(conv.bias, (0, more))
    return F.conv2d(x_BChw, weight, bias, padding=conv.padding)[:, : conv.out_channels]


class ResBlock(nn.Module):
    """Norm, SiLU and convolution twice, plus the input, which goes through a 1x1 convolution where
    the number of channels changes."""

    def __init__(self, inner: int, outer: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = group_norm(outer)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, inner, h, w) -> (B, outer, h, w)."""
        h_BChw = self.conv1(normed(self.norm1, x_BChw))
        h_BChw = self.conv2(self.dropout(normed(self.norm2, h_BChw)))
        if torch.is_grad_enabled():
            return self.nin_shortcut(x_BChw) + h_BChw
        return h_BChw.add_(self.nin_shortcut(x_BChw))


class AttnBlock(nn.Module):
    """Single-head attention over the positions of the map, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        B, C, h, w = x_BChw.shape
        q_B1NC, k_B1NC, v_B1NC = (
            self.qkv(normed(self.norm, x_BChw, silu=False))
            .view(B, 3, 1, C, h * w)
            .transpose(-1, -2)
            .unbind(1)
        )
        o_B1NC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)
        return x_BChw + self.proj_out(o_B1NC.transpose(-1, -2).reshape(B, C, h, w))


class Downsample(nn.Module):
    """Halve the sides; the padding is at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x_BChw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides by repeating every cell, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        if not torch.is_grad_enabled() and not x_BChw.is_cuda:
            return convolve_doubled(x_BChw, self.conv)
        return self.conv(F.interpolate(x_BChw, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, at the coarsest level each followed by attention, and then a
    change of size."""

    def __init__(
        self, inner: int, outer: int, blocks: int, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(inner if k == 0 else outer, outer, dropout) for k in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(outer) for _ in range(blocks if attention else 0))

    def add_resize(self, name: str, resize: nn.Module) -> None:
        """Add the change of size: `downsample` in the encoder, `upsample` in the decoder."""
        self.add_module(name, resize)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, inner, h, w) -> (B, outer, h', w')."""
        for k, block in enumerate(self.block):
            x_BChw = block(x_BChw)
            if len(self.attn):
                x_BChw = self.attn[k](x_BChw)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x_BChw = self.get_submodule(name)(x_BChw)
        return x_BChw


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x_BChw)))


CH_MULT = (1, 1, 2, 2, 4)
"""width of each level of the official CNN in units of `ch`; each level has half the sides of the
one before"""
RES_BLOCKS = 2


class Encoder(nn.Module):
    """The official CNN: images (B, 3, 16h, 16w) -> (B, z, h, w)."""

    def __init__(self, ch: int, z_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [ch * m for m in CH_MULT]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(
                widths[i - 1] if i else ch, width, RES_BLOCKS, attention=i == last, dropout=dropout
            )
            if i != last:
                level.add_resize("downsample", Downsample(width))
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, 3, 16h, 16w) -> (B, z, h, w)."""
        x_BChw = self.conv_in(x_BChw)
        for level in self.down:
            x_BChw = level(x_BChw)
        return self.conv_out(normed(self.norm_out, self.mid(x_BChw)))


class Decoder(nn.Module):
    """The official CNN: (B, z, h, w) -> images (B, 3, 16h, 16w)."""

    def __init__(self, ch: int, z_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [ch * m for m in CH_MULT]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):  # `forward` runs them from the last to the first
            level = Level(
                widths[min(i + 1, last)],
                width,
                RES_BLOCKS + 1,
                attention=i == last,
                dropout=dropout,
            )
            if i:
                level.add_resize("upsample", Upsample(width))
            self.up.append(level)
        self.norm_out = group_norm(ch)
        self.conv_out = nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, z_BChw: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, 16h, 16w)."""
        x_BChw = self.mid(self.conv_in(z_BChw))
        for level in reversed(self.up):
            x_BChw = level(x_BChw)
        return to_pixels(self.conv_out, normed(self.norm_out, x_BChw))


class PatchResBlock(nn.Module):
    """A light residual block: norm, SiLU, 3x3, norm, SiLU, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, 8)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels, 8)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        h_BChw = self.conv1(F.silu(self.norm1(x_BChw)))
        return x_BChw + self.conv2(F.silu(self.norm2(h_BChw)))


def patch_encoder(patch: int, hidden: int, z_channels: int, blocks: int = 1) -> nn.Sequential:
    """Images (B, 3, patch*h, patch*w) -> (B, z, h, w). All layers work on the small grid, so it is
    fast on a CPU."""
    return nn.Sequential(
        nn.PixelUnshuffle(patch),
        nn.Conv2d(3 * patch * patch, hidden, 3, padding=1),
        *(PatchResBlock(hidden) for _ in range(blocks)),
        group_norm(hidden, 8),
        nn.SiLU(),
        nn.Conv2d(hidden, z_channels, 3, padding=1),
    )


def patch_decoder(patch: int, hidden: int, z_channels: int, blocks: int = 1) -> nn.Sequential:
    """The reverse of `patch_encoder`: (B, z, h, w) -> (B, 3, patch*h, patch*w)."""
    return nn.Sequential(
        nn.Conv2d(z_channels, hidden, 3, padding=1),
        *(PatchResBlock(hidden) for _ in range(blocks)),
        group_norm(hidden, 8),
        nn.SiLU(),
        nn.Conv2d(hidden, 3 * patch * patch, 3, padding=1),
        nn.PixelShuffle(patch),
    )
