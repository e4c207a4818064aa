"""Zero-shot editing as in the official notebook: in-painting, out-painting, class-conditional
editing.

The image is encoded as tokens. At every scale the code vectors of the image stay where the mask
keeps them, and the model draws the others. Scales with at most three tokens are those of the image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from var_scale.data.images import open_image
from var_scale.data.transforms import eval_transform, who_resizes
from var_scale.errors import UserError
from var_scale.evaluate.generate import seed_of, to_uint8
from var_scale.evaluate.source import Source
from var_scale.model.sampling import Hooks, SeedPerImage, Settings, sample
from var_scale.scales import cells, grid

NOTEBOOK = Settings(cfg=3.0, top_k=900, top_p=0.95, more_smooth=True)
"""The settings of the official notebook."""
WHOLE = 3
"""Scales with at most this many tokens are taken from the image."""


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """A mask (h, w), 1 inside of `box` = (top, left, bottom, right), given as shares of the
    picture.

    Raises:
        UserError: the box is malformed or contains no cell.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(
            f"--box {','.join(f'{v:g}' for v in box)}: give top,left,bottom,right from 0 to 1, "
            "such as 0.25,0.25,0.75,0.75",
            code="evaluate.box",
        )
    mask = np.zeros(size, np.float32)
    h, w = size
    mask[round(top * h) : round(bottom * h), round(left * w) : round(right * w)] = 1
    if not mask.any():
        raise UserError(
            f"--box {','.join(f'{v:g}' for v in box)}: contains no cell of a {h}x{w} map; enlarge "
            "it",
            code="evaluate.box",
        )
    return mask


def _opened(path: Path, mode: str) -> np.ndarray:
    """A picture as uint8: (H, W) for mode L, (H, W, 3) for RGB."""
    if not path.is_file():
        raise UserError(f"{path}: this picture does not exist", code="evaluate.picture")
    return np.array(open_image(path.read_bytes(), str(path)).convert(mode))


def image_mask(path: Path) -> np.ndarray:
    """A mask (H, W) of a picture, 1 where it is light.

    Raises:
        UserError: nothing is light.
    """
    mask = _opened(path, "L").astype(np.float32) / 255
    if not (mask > 0.5).any():
        raise UserError(
            f"{path}: nothing in this mask is light, so nothing would be redrawn",
            code="evaluate.nothing-to-draw",
        )
    return mask


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture as uint8 (H, W, 3), resized and cropped at the centre like validation images,
    unless it already has the size."""
    image = _opened(path, "RGB")
    return image if image.shape[:2] == size else eval_transform(image, size, who_resizes("auto"))


@torch.no_grad()
def edit(
    source: Source,
    image_HW3: np.ndarray,
    redraw_hw: np.ndarray,
    label: int,
    count: int,
    seed: int,
    settings: Settings = NOTEBOOK,
) -> np.ndarray:
    """Redraw the part of a picture that `redraw_hw` marks with 1, as class `label` (-1: none).

    Args:
        redraw_hw: a mask of any size.

    Returns:
        `count` edits, uint8 (count, H, W, 3), each with its own randomness.
    """
    var, vae = source.var, source.var.vae_proxy[0]
    device = var.lvl_1L.device
    x_13HW = (
        torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1)[None].to(device).float()
        / 127.5
        - 1
    )
    truth = [vae.quantize.embedding(idx_1l) for idx_1l in vae.img_to_idxBl(x_13HW)]
    mask_11hw = torch.from_numpy(np.ascontiguousarray(redraw_hw, dtype=np.float32))[None, None].to(
        device
    )

    def codes(si: int, idx_Bl: Tensor, h_BlC: Tensor) -> Tensor:
        pn = var.patch_nums[si]
        if cells([pn])[0] <= WHOLE:
            return truth[si].expand_as(h_BlC).to(h_BlC)
        keep_11hw = F.interpolate(
            1 - mask_11hw, size=grid(pn), mode="bilinear", align_corners=False
        )
        keep_1l1 = (keep_11hw > 0.5).reshape(1, -1, 1)
        return torch.where(keep_1l1, truth[si].to(h_BlC), h_BlC)

    labels = torch.full((count,), var.num_classes if label < 0 else label, device=device)
    draws = SeedPerImage([seed_of(seed, label, number) for number in range(count)])
    return to_uint8(sample(var, labels, settings, draws, Hooks(codes=codes)).images)
