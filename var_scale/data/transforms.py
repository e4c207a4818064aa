"""Real images to network input: the official VAR transform, with keyed instead of global randomness."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from var_scale.data.order import uniform

MID_FACTOR = 1.125  # official: shorter side to round(1.125 * reso), then a crop of reso


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` with LANCZOS, the longer one to int(size·long/short), as torchvision's Resize(size)."""
    width, height = image.size
    if min(width, height) == size:
        return image
    new = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    return image.resize(new, Image.Resampling.LANCZOS)


def _resized(image: Image.Image, reso: int) -> Image.Image:
    return resize_shorter(image.convert("RGB"), round(MID_FACTOR * reso))


def _crop(image: Image.Image, left: int, top: int, reso: int) -> np.ndarray:
    return np.asarray(image.crop((left, top, left + reso, top + reso)), dtype=np.uint8)


def eval_transform(image: Image.Image, reso: int) -> np.ndarray:
    """Resize and centre crop: uint8 (reso, reso, 3)."""
    resized = _resized(image, reso)
    width, height = resized.size
    return _crop(resized, round((width - reso) / 2), round((height - reso) / 2), reso)


def train_transform(image: Image.Image, reso: int, seed: int, epoch: int, sample: int) -> np.ndarray:
    """Resize and random crop, no flip: uint8 (reso, reso, 3); the crop is a pure function of (seed, epoch, sample)."""
    resized = _resized(image, reso)
    width, height = resized.size
    across, down = uniform(seed, f"crop/{epoch}", sample, 2)
    return _crop(resized, int(across * (width - reso + 1)), int(down * (height - reso + 1)), reso)


def to_minus1_1(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], as the official ToTensor and 2x - 1; keeps the device."""
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    unit = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div(255)
    return unit.add_(unit.clone()).add_(-1)
