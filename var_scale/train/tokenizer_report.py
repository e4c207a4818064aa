"""Quality of a tokenizer: reconstruction error, use of the codebook per scale, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from var_scale.data.image_loader import ImageData
from var_scale.data.transforms import to_minus1_1
from var_scale.files import atomic_file
from var_scale.model.frechet import Moments, frechet
from var_scale.model.perceptual import STAGES, VGG16
from var_scale.model.vqvae import VQVAE


def perplexity(hits_SV: Tensor) -> list[float]:
    """exp(entropy) of the codes of each scale, from their counts (S, V)."""
    p_SV = hits_SV.double() / hits_SV.sum(dim=1, keepdim=True)
    found: list[float] = torch.exp(-torch.xlogy(p_SV, p_SV).sum(dim=1)).tolist()
    return found


@torch.no_grad()
def assess(
    vae: VQVAE,
    val: ImageData,
    device: torch.device,
    vgg: VGG16 | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """Measure on the first validation images: at most 4096, or 50,000 with `vgg`.

    Returns the reconstruction error of pixels in [0, 1], the PSNR after each number of scales, and
    per scale the perplexity of the codebook and the number of codes in use. With `vgg` also
    rfd_vgg16: the Fréchet distance between images and reconstructions of the last activations of
    VGG-16, averaged over positions. It is computed like rFID, but with another network, so the
    values are not comparable.
    """
    n, scales = min(50000 if vgg else 4096, val.num_samples), len(vae.patch_nums)
    hits_SV = torch.zeros(scales, vae.V, dtype=torch.long, device=device)
    squared_S, absolute, count = torch.zeros(scales, dtype=torch.float64), 0.0, 0
    real, made = (Moments(STAGES[-1][-1], device) for _ in range(2))
    for start in range(0, n, batch):
        img = to_minus1_1(
            torch.as_tensor(val.images(np.arange(start, min(start + batch, n)))).to(device)
        )
        idx_list = vae.img_to_idxBl(img)
        out = vae.idxBl_to_img(idx_list, same_shape=True)
        for scale, (part, idx) in enumerate(zip(out, idx_list, strict=True)):
            squared_S[scale] += float(((part - img) / 2).square().sum())
            hits_SV[scale] += torch.bincount(idx.flatten(), minlength=vae.V)
        if vgg:
            for moments, images in ((real, img), (made, out[-1])):
                moments.add(vgg(images)[-1].mean((2, 3)))
        absolute += float(((out[-1] - img) / 2).abs().sum())
        count += img.numel()
    psnr_S = (-10 * torch.log10(squared_S / count)).tolist()
    distance = {"rfd_vgg16": frechet(real, made)} if vgg else {}
    return {
        "images": n,
        **distance,
        "mse": float(squared_S[-1]) / count,
        "psnr_db": psnr_S[-1],
        "mae": absolute / count,
        "psnr_by_scales": psnr_S,
        "perplexity_per_scale": perplexity(hits_SV),
        "codes_used_per_scale": (hits_SV > 0).sum(dim=1).tolist(),
    }


@torch.no_grad()
def picture(
    vae: VQVAE, val: ImageData, path: Path, device: torch.device, columns: int = 16
) -> None:
    """Write a picture with one row per number of scales, from the first alone to all, and the
    originals in the last row."""
    images = val.images(np.arange(min(columns, val.num_samples)))
    out = vae.img_to_reconstructed_img(to_minus1_1(torch.as_tensor(images).to(device)))
    rows = [
        ((part.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for part in out
    ]
    strips = []
    for row in (*rows, images):
        strips += [
            np.concatenate(list(row), axis=1),
            np.full((2, row.shape[2] * len(row), 3), 255, np.uint8),
        ]
    sheet = Image.fromarray(np.concatenate(strips[:-1], axis=0))
    zoom = max(1, 96 // images.shape[1])
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
