"""Sampling images from a trained run, and grids of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from var_scale.files import atomic_file
from var_scale.model.load import build_model, load_tokenizer, tokenizer_file
from var_scale.train.loop import newest_checkpoint


def load_run(folder: Path, device: torch.device) -> tuple[torch.nn.Module, int]:
    """The newest checkpoint of a run as a VAR in eval mode, and its number of classes."""
    config, checkpoint = newest_checkpoint(folder)
    tokenizer, beside = config.tokenizer, tokenizer_file(folder.resolve().parent / "tokenizer")
    if tokenizer.weights and not Path(tokenizer.weights).exists() and beside.exists():  # the study was moved or copied
        tokenizer = tokenizer.model_copy(update={"weights": str(beside)})
    vae, _ = load_tokenizer(tokenizer, device)
    var = build_model(config, vae, device)
    checkpoint.load_into(var)
    return var.eval(), config.classes


def sample_images(
    var: torch.nn.Module, classes: list[int], per_class: int, *, seed: int, cfg: float, top_k: int, top_p: float, more_smooth: bool = False
) -> np.ndarray:
    """uint8 images (classes, per_class, H, W, 3). One seed a class, so a class does not depend on which others are asked for."""
    rows = []
    for label in classes:
        label_B = torch.full((per_class,), label, device=next(var.parameters()).device)
        with torch.inference_mode():
            out = var.autoregressive_infer_cfg(  # type: ignore[operator]
                per_class, label_B, g_seed=seed + label, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth
            )
        rows.append((out.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.stack(rows)


def write_grid(images: np.ndarray, path: Path, zoom: int = 1, gap: int = 2) -> None:
    """Write (rows, columns, H, W, 3) images as one PNG, a row a class."""
    rows, columns, h, w, _ = images.shape
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            sheet[r * (h + gap) : r * (h + gap) + h, c * (w + gap) : c * (w + gap) + w] = images[r, c]
    picture = Image.fromarray(sheet)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    with atomic_file(path) as file:
        picture.save(file, "PNG")
