"""Real images to network input: the official VAR transform, with keyed instead of global
randomness."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from var_scale.data.images import open_image
from var_scale.data.order import uniform
from var_scale.errors import UserError

MID_FACTOR = 1.125
"""As the official code: the shorter side to round(1.125 * reso), then a crop of reso."""
Resize = Literal["torch", "pillow"]
"""PyTorch's Lanczos on uint8 (at most 2 grey levels from Pillow, twice as fast), or Pillow as the
official code."""


def pil_loader(path: str) -> Image.Image:
    """Open an image as RGB; the official notebooks import this name."""
    return open_image(Path(path).read_bytes(), path)


def normalize_01_into_pm1(x: torch.Tensor) -> torch.Tensor:
    """Map [0, 1] to [-1, 1]; the official notebooks import this name."""
    return x.add(x).add_(-1)


def who_resizes(wanted: str) -> Resize:
    """Resolve `auto` by what this PyTorch supports.

    Raises:
        UserError: `torch` is requested but not supported.
    """
    try:
        interpolate(
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size=(4, 4), mode="lanczos", antialias=True
        )
    except (NotImplementedError, ValueError):
        if wanted == "torch":
            raise UserError(
                f"data.resize=torch: PyTorch {torch.__version__} has no Lanczos (2.12 has); set "
                "data.resize=pillow",
                code="data.resize-torch",
            ) from None
        return "pillow"
    return "pillow" if wanted == "pillow" else "torch"


def resize_to_cover(image: np.ndarray, size: tuple[int, int], resize: Resize) -> np.ndarray:
    """Resize (H, W, 3) by Lanczos to the smallest size that covers `size` (height, width).

    One side becomes that of `size`, the other int(side * ratio); for a square this is torchvision's
    Resize(size).
    """
    height, width = image.shape[:2]
    down, across = size
    new = (
        (across, int(across * height / width))
        if width * down <= height * across
        else (int(down * width / height), down)
    )
    if new == (width, height):
        return image
    if resize == "pillow":
        return np.asarray(Image.fromarray(image).resize(new, Image.Resampling.LANCZOS))
    image_1CHW = torch.from_numpy(image).permute(2, 0, 1)[None]
    return (
        interpolate(image_1CHW, size=new[::-1], mode="lanczos", antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )


def _middle(size: tuple[int, int]) -> tuple[int, int]:
    """The size that an image must cover before the crop."""
    return round(MID_FACTOR * size[0]), round(MID_FACTOR * size[1])


def eval_transform(
    image: np.ndarray, size: tuple[int, int], resize: Resize = "torch"
) -> np.ndarray:
    """uint8 (H, W, 3): resize and centre crop to `size` (height, width)."""
    image = resize_to_cover(image, _middle(size), resize)
    top, left = (
        round((side - wanted) / 2) for side, wanted in zip(image.shape[:2], size, strict=True)
    )
    return image[top : top + size[0], left : left + size[1]]


def train_transform(
    image: np.ndarray,
    size: tuple[int, int],
    seed: int,
    epoch: int,
    sample: int,
    resize: Resize = "torch",
) -> np.ndarray:
    """uint8 (H, W, 3): resize and random crop to `size` (height, width), without a flip.

    The crop is a pure function of (seed, epoch, sample).
    """
    image = resize_to_cover(image, _middle(size), resize)
    across, down = uniform(seed, f"crop/{epoch}", sample, 2)
    left = int(across * (image.shape[1] - size[1] + 1))
    top = int(down * (image.shape[0] - size[0] + 1))
    return image[top : top + size[0], left : left + size[1]]


def to_minus1_1(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], rounded as the official ToTensor and
    2x - 1; keeps the device."""
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    unit = (
        images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div(255)
    )
    return unit.add_(unit.clone()).add_(-1)
