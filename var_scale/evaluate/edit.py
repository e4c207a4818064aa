"""Zero-shot editing: in-painting, out-painting, class-conditional editing (the official notebook's way; spec/var-reference.md 1.8).

The image is turned into tokens; at every scale the code vectors of the image stay where the mask keeps it, the model's own go elsewhere.
The scales of up to three tokens are the image's altogether.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from var_scale.data.transforms import eval_transform, who_resizes
from var_scale.errors import UserError
from var_scale.evaluate.generate import seed_of, to_uint8
from var_scale.evaluate.source import Source
from var_scale.model.sampling import Hooks, SeedPerImage, Settings, sample
from var_scale.scales import cells, grid

NOTEBOOK = Settings(cfg=3.0, top_k=900, top_p=0.95, more_smooth=True)
"""how the official notebook draws"""
WHOLE = 3
"""scales of so many tokens or fewer are the image's"""


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """(h, w) of a map, 1 inside `box` = (top, left, bottom, right) as shares of the picture."""
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(f"--box {','.join(f'{v:g}' for v in box)}: give top,left,bottom,right from 0 to 1, such as 0.25,0.25,0.75,0.75")
    mask = np.zeros(size, np.float32)
    h, w = size
    mask[round(top * h) : round(bottom * h), round(left * w) : round(right * w)] = 1
    if not mask.any():
        raise UserError(f"--box {','.join(f'{v:g}' for v in box)}: holds no cell of a {h}x{w} map; make it larger")
    return mask


def _opened(path: Path, mode: str) -> np.ndarray:
    """uint8 of a picture, (H, W) for mode L, (H, W, 3) for RGB."""
    if not path.is_file():
        raise UserError(f"{path}: this picture does not exist")
    try:
        return np.array(Image.open(path).convert(mode))
    except OSError as error:
        raise UserError(f"{path}: is not a picture ({error})") from None


def image_mask(path: Path) -> np.ndarray:
    """(H, W) of a picture: 1 where it is light."""
    mask = _opened(path, "L").astype(np.float32) / 255
    if not (mask > 0.5).any():
        raise UserError(f"{path}: nothing in this mask is light, so nothing would be drawn anew")
    return mask


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3): resized and cropped in the middle as validation images are; as it is where it has the size."""
    image = _opened(path, "RGB")
    return image if image.shape[:2] == size else eval_transform(image, size, who_resizes("auto"))


@torch.no_grad()
def edit(
    source: Source, image_HW3: np.ndarray, redraw_hw: np.ndarray, label: int, count: int, seed: int, settings: Settings = NOTEBOOK
) -> np.ndarray:
    """uint8 (count, H, W, 3): the picture with what `redraw_hw` (any size, 1: draw anew) marks drawn by the model as class `label`, -1:
    none, which is in-painting or, where only the middle is kept, out-painting. Other seeds, other pictures."""
    var, vae = source.var, source.var.vae_proxy[0]
    device = var.lvl_1L.device
    x_13HW = torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
    truth = [vae.quantize.embedding(idx_1l) for idx_1l in vae.img_to_idxBl(x_13HW)]
    mask_11hw = torch.from_numpy(np.ascontiguousarray(redraw_hw, dtype=np.float32))[None, None].to(device)

    def codes(si: int, idx_Bl: Tensor, h_BlC: Tensor) -> Tensor:
        pn = var.patch_nums[si]
        if cells([pn])[0] <= WHOLE:
            return truth[si].expand_as(h_BlC).to(h_BlC)
        keep_1l1 = (F.interpolate(1 - mask_11hw, size=grid(pn), mode="bilinear", align_corners=False) > 0.5).flatten().view(1, -1, 1)
        return torch.where(keep_1l1, truth[si].to(h_BlC), h_BlC)

    labels = torch.full((count,), var.num_classes if label < 0 else label, device=device)
    draws = SeedPerImage([seed_of(seed, label, number) for number in range(count)])
    return to_uint8(sample(var, labels, settings, draws, Hooks(codes=codes)).images)
