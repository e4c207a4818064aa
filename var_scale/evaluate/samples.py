"""Sampling images from a trained run, and grids of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from var_scale.data.loader import ImageData
from var_scale.data.remote import located
from var_scale.files import atomic_file, read_json
from var_scale.model.hub import weights_file
from var_scale.model.load import build_model, load_tokenizer, tokenizer_file
from var_scale.train.loop import newest_checkpoint


def load_run(folder: Path, device: torch.device, step: int | None = None) -> tuple[torch.nn.Module, int]:
    """The newest checkpoint of a run, or that of `step`, as a VAR in eval mode, and its number of classes."""
    config, checkpoint = newest_checkpoint(folder, step)
    tokenizer, beside = config.tokenizer, tokenizer_file(folder.resolve().parent / "tokenizer")
    if tokenizer.weights and not weights_file(tokenizer.weights).exists() and beside.exists():  # the study was moved or copied
        tokenizer = tokenizer.model_copy(update={"weights": str(beside)})
    vae, _ = load_tokenizer(tokenizer, device)
    var = build_model(config, vae, device)
    checkpoint.load_into(var)
    return var.eval(), config.classes


def class_names(folder: Path, labels: Sequence[int]) -> list[str] | None:
    """Names of `labels` as the run's data had them, None where it had none."""
    path = folder / "run.json"  # an imported run has none before it is trained
    names = read_json(path, "description of a run").get("class_names") if path.exists() else None
    return [f"{label} {names[label]}" if label < len(names) else str(label) for label in labels] if names else None


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


def write_grid(
    images: np.ndarray, path: Path, zoom: int = 1, gap: int = 2, names: Sequence[str | Mapping[int, str]] | None = None
) -> None:
    """Write (rows, columns, H, W, 3) images as one PNG, a row a class, with the class's name above it where `names` (rows) are given, or
    texts above some columns of it."""
    rows, columns, h, w, _ = images.shape
    line, (down, across) = 14 if names else 0, ((h * zoom) + gap, (w * zoom) + gap)
    picture = Image.new("RGB", (columns * across - gap, rows * (down + line) - gap), "white")
    pen = ImageDraw.Draw(picture)
    for r in range(rows):
        if names:
            texts = names[r]
            for column, text in {0: texts}.items() if isinstance(texts, str) else texts.items():
                pen.text((2 + column * across, r * (down + line) + 1), text, "black")
        for c in range(columns):
            image = Image.fromarray(images[r, c]).resize((w * zoom, h * zoom), Image.Resampling.NEAREST)
            picture.paste(image, (c * across, r * (down + line) + line))
    with atomic_file(path) as file:
        picture.save(file, "PNG")


def contact_sheet(folder: Path, path: Path, rows: int = 10, columns: int = 10, size: int = 96) -> None:
    """The first images of evenly chosen classes of a folder of image shards, a row a class, as one PNG."""
    data = ImageData(located(str(folder)), (size, size))
    present = np.unique(data.labels)
    chosen = present[np.linspace(0, len(present) - 1, min(rows, len(present))).astype(int)]
    grid = np.full((len(chosen), columns, size, size, 3), 255, np.uint8)
    for row, label in enumerate(chosen):
        found = np.flatnonzero(data.labels == label)[:columns]
        grid[row, : len(found)] = data.images(found)
    known = data.manifest.class_names
    write_grid(grid, path, names=[f"{label} {known[label]}" if known else f"class {label}" for label in chosen])
