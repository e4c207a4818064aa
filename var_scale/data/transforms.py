"""Real images to network input: the official VAR transform, with keyed instead of global randomness."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from var_scale.data.order import uniform
from var_scale.errors import UserError

MID_FACTOR = 1.125  # official: shorter side to round(1.125 * reso), then a crop of reso
Resize = Literal["torch", "pillow"]
"""Who resizes: PyTorch's Lanczos on uint8 (at most 2 grey levels from Pillow, twice as fast), or Pillow, as the official code."""


def who_resizes(wanted: str) -> Resize:
    """`auto` as what this PyTorch can do. UserError if `torch` is wanted of one that cannot."""
    try:
        interpolate(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size=(4, 4), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        if wanted == "torch":
            raise UserError(f"data.resize=torch: PyTorch {torch.__version__} has no Lanczos, 2.12 has; set data.resize=pillow") from None
        return "pillow"
    return "pillow" if wanted == "pillow" else "torch"


def resize_shorter(image: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """(H, W, 3): shorter side to `size` by Lanczos, the longer one to int(size * long / short), as torchvision's Resize(size)."""
    height, width = image.shape[:2]
    if min(width, height) == size:
        return image
    new = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    if resize == "pillow":
        return np.asarray(Image.fromarray(image).resize(new, Image.Resampling.LANCZOS))
    image_1CHW = torch.from_numpy(image).permute(2, 0, 1)[None]
    return interpolate(image_1CHW, size=new[::-1], mode="lanczos", antialias=True)[0].permute(1, 2, 0).numpy()


def eval_transform(image: np.ndarray, reso: int, resize: Resize = "torch") -> np.ndarray:
    """uint8 (H, W, 3): resize and centre crop to (reso, reso, 3)."""
    image = resize_shorter(image, round(MID_FACTOR * reso), resize)
    top, left = (round((side - reso) / 2) for side in image.shape[:2])
    return image[top : top + reso, left : left + reso]


def train_transform(image: np.ndarray, reso: int, seed: int, epoch: int, sample: int, resize: Resize = "torch") -> np.ndarray:
    """uint8 (H, W, 3): resize and random crop to (reso, reso, 3), no flip; the crop is a pure function of (seed, epoch, sample)."""
    image = resize_shorter(image, round(MID_FACTOR * reso), resize)
    height, width = image.shape[:2]
    across, down = uniform(seed, f"crop/{epoch}", sample, 2)
    left, top = int(across * (width - reso + 1)), int(down * (height - reso + 1))
    return image[top : top + reso, left : left + reso]


def to_minus1_1(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], as the official ToTensor and 2x - 1; keeps the device."""
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    unit = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div(255)
    return unit.add_(unit.clone()).add_(-1)
