"""Images to tokens, with the numerics that the caller chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from var_scale.model.vqvae import VQVAE


@contextmanager
def numerics(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 in convolutions and products on NVIDIA GPUs within a context."""
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
    """Images (B, 3, H, W) in [-1, 1] to the tokens (B, L) of all scales.

    `precision` is that of the encoder: fp32, tf32 or bf16. The search for the nearest codes runs in
    float32, because a rounded distance may choose another code.
    """
    # Progressive training restricts the same quantiser to the first scales.
    vae.quantize.prog_si = -1
    with (
        numerics(precision == "tf32"),
        torch.autocast(img_BCHW.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        latent = vae.encode(img_BCHW)
    with numerics(False):
        return torch.cat(vae.quantize.f_to_idxBl_or_fhat(latent.float(), to_fhat=False), dim=1)
