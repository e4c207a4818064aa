"""Grids of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from var_scale.data.image_loader import ImageData
from var_scale.data.remote import located
from var_scale.evaluate.generate import draw, to_uint8
from var_scale.evaluate.source import Source
from var_scale.files import atomic_file
from var_scale.model.sampling import Hooks, Settings
from var_scale.scales import grid


def write_grid(
    images: np.ndarray,
    path: Path,
    zoom: int = 1,
    gap: int = 2,
    names: Sequence[str | Mapping[int, str]] | None = None,
) -> None:
    """Write images (rows, columns, H, W, 3) as one PNG.

    `names` has one entry per row: a text above the row, or texts above some of its columns.
    """
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
            image = Image.fromarray(images[r, c]).resize(
                (w * zoom, h * zoom), Image.Resampling.NEAREST
            )
            picture.paste(image, (c * across, r * (down + line) + line))
    with atomic_file(path) as file:
        picture.save(file, "PNG")


def contact_sheet(
    folder: Path, path: Path, rows: int = 10, columns: int = 10, size: int = 96
) -> None:
    """Write the first images of evenly chosen classes of a folder of image shards as one PNG, one
    row per class."""
    data = ImageData(located(str(folder)), (size, size))
    present = np.unique(data.labels)
    chosen = present[np.linspace(0, len(present) - 1, min(rows, len(present))).astype(int)]
    images = np.full((len(chosen), columns, size, size, 3), 255, np.uint8)
    for row, label in enumerate(chosen):
        found = np.flatnonzero(data.labels == label)[:columns]
        images[row, : len(found)] = data.images(found)
    known = data.manifest.class_names
    write_grid(
        images,
        path,
        names=[f"{label} {known[label]}" if known else f"class {label}" for label in chosen],
    )


def steps_picture(
    source: Source, labels: Sequence[int], seed: int, settings: Settings, path: Path, zoom: int = 1
) -> None:
    """Write a picture with one row per class: its first image after every scale."""
    steps: list[np.ndarray] = []
    vae = source.var.vae_proxy[0]

    def keep(si: int, f_hat_BChw: torch.Tensor) -> None:
        steps.append(to_uint8(vae.fhat_to_img(f_hat_BChw).add(1).mul(0.5)))

    draw(source, labels, [0] * len(labels), seed, settings, Hooks(scale=keep))
    sizes = {k: "x".join(map(str, grid(pn))) for k, pn in enumerate(source.var.patch_nums) if k}
    names = [{0: source.label(label), **sizes} for label in labels]
    write_grid(np.stack(steps, axis=1), path, zoom=zoom, names=names)
