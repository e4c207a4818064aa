"""What a study's models draw: a grid of the largest, and how pictures grow with size and compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from var_scale.cluster.pipeline import Study
from var_scale.config.schema import Config
from var_scale.evaluate.generate import grid_of_classes
from var_scale.evaluate.pictures import write_grid
from var_scale.evaluate.source import load_source
from var_scale.model.sampling import Settings
from var_scale.progress import say
from var_scale.run_folder import RunFolder
from var_scale.study.record import RunRecord
from var_scale.train.checkpoint import checkpoints

CLASSES = 4
"""of the picture of growth"""


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _healthy(study: Study, kept: Mapping[str, RunRecord]) -> list[tuple[Config, RunFolder]]:
    return [(config, run) for config, run in study.runs() if config.name in kept]


def samples(study: Study, kept: Mapping[str, RunRecord]) -> Path | None:
    """A grid of images from the largest healthy run; an earlier picture stays when its checkpoints were removed since."""
    path, runs, spec = study.report / "samples.png", _healthy(study, kept), study.spec
    if not runs:
        return None
    config, run = runs[-1]
    if not checkpoints(run.checkpoints):
        say(f"samples of {config.name}: it has no checkpoint any more" + (", the picture of before stays" if path.exists() else ""))
        return path if path.exists() else None
    source = load_source(str(run.path), _device())
    labels = list(range(min(source.classes, spec.sample_classes)))
    images = grid_of_classes(source, labels, spec.samples_per_class, 0, Settings(spec.cfg, spec.top_k, spec.top_p))
    write_grid(images, path, zoom=max(1, 96 // images.shape[2]), names=[source.label(c) for c in labels] if source.class_names else None)
    say(f"samples of {config.name}: {path}")
    return path


def growth(study: Study, kept: Mapping[str, RunRecord]) -> Path | None:
    """The same classes and seeds from every size (rows) at every checkpoint that was kept (columns), as the paper's figure 7; of each size
    the first healthy run. None where no run has two checkpoints or more; an earlier picture stays as that of `samples` does."""
    path, spec = study.report / "growth.png", study.spec
    sizes: dict[int, tuple[Config, RunFolder]] = {}
    for config, run in _healthy(study, kept):
        sizes.setdefault(config.model.depth, (config, run))
    steps = {depth: [c.step for c in checkpoints(run.checkpoints)] for depth, (_, run) in sizes.items()}
    if path.exists() and not all(steps.values()):  # checkpoints were removed since
        return path
    sizes = {depth: found for depth, found in sizes.items() if steps[depth]}
    if max((len(steps[depth]) for depth in sizes), default=0) < 2:
        return None
    rows, names = [], []
    for depth, (config, run) in sizes.items():
        tiles: list[np.ndarray] = []
        text: dict[int, str] = {}
        record = kept[config.name]
        for step in steps[depth]:
            source = load_source(str(run.path), _device(), step=step)
            labels = list(range(min(source.classes, CLASSES)))
            text[len(tiles)] = f"d{depth}, {record.flops_exact * step / max(steps[depth]):.2g} FLOP"
            tiles += list(grid_of_classes(source, labels, 1, 0, Settings(spec.cfg, spec.top_k, spec.top_p))[:, 0])
        rows.append(tiles)
        names.append(text)
    blank = np.full_like(rows[0][0], 255)
    grid = np.stack([np.stack([*tiles, *[blank] * (max(map(len, rows)) - len(tiles))]) for tiles in rows])
    write_grid(grid, path, zoom=max(1, 64 // blank.shape[0]), names=names)
    say(f"sizes and compute: {path}")
    return path
