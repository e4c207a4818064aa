"""Images to tokens in the numerics that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from var_scale.model.vqvae import VQVAE


@contextmanager
def numerics(tf32: bool) -> Iterator[None]:
    """TF32 in convolutions and products on NVIDIA GPUs, or not; as before afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@torch.no_grad()
def encode(vae: VQVAE, img_BCHW: Tensor, precision: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to the tokens (B, L) of all scales; `precision` of the encoder: fp32, tf32, bf16. The search of the
    codes is in float32."""
    vae.quantize.prog_si = -1  # progressive training shortens the same quantiser
    with numerics(precision == "tf32"), torch.autocast(img_BCHW.device.type, torch.bfloat16, enabled=precision == "bf16"):
        latent = vae.encode(img_BCHW)
    with numerics(False):
        return torch.cat(vae.quantize.f_to_idxBl_or_fhat(latent.float(), to_fhat=False), dim=1)
