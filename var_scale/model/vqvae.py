"""The VQVAE: images to multi-scale tokens and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from var_scale.errors import UserError, require_grids, require_positive
from var_scale.model.networks import CH_MULT, Decoder, Encoder, patch_decoder, patch_encoder
from var_scale.model.quantizer import MultiScaleQuantizer
from var_scale.scales import PATCH_NUMS_256, PatchNum, grid

USAGE = "quantize.ema_vocab_hit_SV"
"""Buffer that counts how often each code is used: a statistic, which no result depends on."""


class VQVAE(nn.Module):
    """Encoder, multi-scale quantiser, decoder, with the official method and tensor names.

    `arch="cnn"` is the official network, with 16 x 16 pixels per token of the last scale;
    `arch="patch"` is a small one, with `patch` x `patch` pixels and `hidden` channels. Images are
    (B, 3, H, W) in [-1, 1]. `test_mode` freezes the weights and switches to evaluation.

    Raises:
        UserError: code `model.sizes`, or one of `require_positive` and `require_grids`.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 128,
        dropout: float = 0.0,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[PatchNum] = PATCH_NUMS_256,
        test_mode: bool = True,
        arch: str = "cnn",
        patch: int = 8,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        require_positive(
            vocab_size=vocab_size, z_channels=z_channels, ch=ch, patch=patch, hidden=hidden
        )
        require_grids(v_patch_nums=v_patch_nums)
        self.test_mode = test_mode
        self.V, self.Cvae = vocab_size, z_channels
        self.arch, self.ch, self.patch, self.hidden = arch, ch, patch, hidden
        self.encoder: nn.Module
        self.decoder: nn.Module
        if arch == "cnn":
            if ch % 32:
                raise UserError(
                    f"tokenizer.ch: {ch} is not a multiple of 32, the number of groups",
                    code="model.sizes",
                )
            self.encoder = Encoder(ch, z_channels, dropout)
            self.decoder = Decoder(ch, z_channels, dropout)
            self.downsample = 2 ** (len(CH_MULT) - 1)
        elif arch == "patch":
            if hidden % 8:
                raise UserError(
                    f"tokenizer.hidden: {hidden} is not a multiple of 8, the number of groups",
                    code="model.sizes",
                )
            self.encoder = patch_encoder(patch, hidden, z_channels)
            self.decoder = patch_decoder(patch, hidden, z_channels)
            self.downsample = patch
        else:
            raise UserError(
                f"tokenizer.arch: {arch!r} is unknown; use cnn or patch", code="model.sizes"
            )
        self.quantize = MultiScaleQuantizer(
            vocab_size,
            z_channels,
            using_znorm,
            beta,
            default_qresi_counts,
            v_patch_nums,
            quant_resi,
            share_quant_resi,
        )
        self.quant_conv = nn.Conv2d(
            z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2
        )
        self.post_quant_conv = nn.Conv2d(
            z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2
        )
        if test_mode:
            self.eval()
            self.requires_grad_(False)

    @property
    def patch_nums(self) -> tuple[PatchNum, ...]:
        """Token grid of each scale."""
        return self.quantize.v_patch_nums

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that fit `patch_nums`."""
        height, width = grid(self.patch_nums[-1])
        return height * self.downsample, width * self.downsample

    def encode(self, inp: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the map (B, C, h, w) that is quantised."""
        return self.quant_conv(self.encoder(inp))

    def decode(self, f_hat: Tensor) -> Tensor:
        """Quantised map (B, C, h, w) -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype)))

    def prepare_decoder(self, dtype: torch.dtype) -> None:
        """Decode in `dtype` and in the memory format in which convolutions are fastest. The encoder
        and the quantiser stay as they are, because half precision would change tokens."""
        for module in (self.post_quant_conv, self.decoder):
            module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, inp: Tensor, ret_usages: bool = False
    ) -> tuple[Tensor, list[float] | None, Tensor]:
        """Images -> reconstruction, usage of codes in percent per scale or None, and VQ loss, with
        gradients."""
        f_hat, usages, vq_loss = self.quantize(self.encode(inp), ret_usages=ret_usages)
        return self.decode(f_hat), usages, vq_loss

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """Quantised map (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode(f_hat).clamp(-1, 1)

    def img_to_idxBl(
        self, inp_img_no_grad: Tensor, v_patch_nums: Sequence[PatchNum] | None = None
    ) -> list[Tensor]:
        """Images (B, 3, H, W) -> the tokens (B, h*w) of every scale."""
        return self.quantize.f_to_idxBl_or_fhat(
            self.encode(inp_img_no_grad), to_fhat=False, v_patch_nums=v_patch_nums
        )

    def idxBl_to_img(
        self, ms_idx_Bl: Sequence[Tensor], same_shape: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Tokens (B, h*w) of every scale -> the images (B, 3, H, W) in [-1, 1] after each scale, or
        the last one."""
        ms_h_BChw = []
        for idx_Bl, patch_num in zip(ms_idx_Bl, self.patch_nums, strict=False):
            codes_BCl = self.quantize.embedding(idx_Bl).transpose(1, 2)
            ms_h_BChw.append(codes_BCl.reshape(idx_Bl.shape[0], self.Cvae, *grid(patch_num)))
        return self.embed_to_img(ms_h_BChw, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Code vectors (B, C, h, w) of every scale -> images after each scale, or the last one."""
        f_hat = self.quantize.embed_to_fhat(
            ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one
        )
        return (
            self.fhat_to_img(f_hat)
            if isinstance(f_hat, Tensor)
            else [self.fhat_to_img(f) for f in f_hat]
        )

    def img_to_reconstructed_img(
        self, x: Tensor, v_patch_nums: Sequence[PatchNum] | None = None, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Images -> reconstructions (B, 3, H, W) in [-1, 1] after each scale, or the last one."""
        ls_f_hat = self.quantize.f_to_idxBl_or_fhat(
            self.encode(x), to_fhat=True, v_patch_nums=v_patch_nums
        )
        return (
            self.fhat_to_img(ls_f_hat[-1]) if last_one else [self.fhat_to_img(f) for f in ls_f_hat]
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but ignores a usage buffer of another number of scales: it is a statistic."""
        usage = state_dict.get(USAGE)
        if (
            isinstance(usage, torch.Tensor)
            and usage.shape[0] != self.quantize.ema_vocab_hit_SV.shape[0]
        ):
            state_dict = {**state_dict, USAGE: self.quantize.ema_vocab_hit_SV}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
