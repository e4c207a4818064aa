"""Samples of a study's models: a grid of the largest, and the same images over size and compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from var_scale.config.schema import Config
from var_scale.evaluate.generate import grid_of_classes
from var_scale.evaluate.pictures import write_grid
from var_scale.evaluate.source import choose_device, load_source
from var_scale.model.sampling import Settings
from var_scale.progress import say
from var_scale.records.record import RunRecord
from var_scale.run_folder import RunFolder
from var_scale.study.study import Study
from var_scale.train.checkpoint import checkpoints

CLASSES = 4
"""Classes in the picture of growth."""


def _healthy(study: Study, kept: Mapping[str, RunRecord]) -> list[tuple[Config, RunFolder]]:
    """The runs that passed the gate, smallest model first; none where tokens encode no images."""
    if study.config.data.teacher:
        return []
    return [(config, run) for config, run in study.runs() if config.name in kept]


def samples(study: Study, kept: Mapping[str, RunRecord]) -> Path | None:
    """A grid of images from the largest healthy run.

    Where its checkpoints were removed, an earlier picture stays; None without either.
    """
    path, runs, spec = study.report / "samples.png", _healthy(study, kept), study.spec
    if not runs:
        return None
    config, run = runs[-1]
    if not checkpoints(run.checkpoints):
        stays = "; the earlier picture is kept" if path.exists() else ""
        say(f"samples of {config.name}: the run has no checkpoint any more{stays}")
        return path if path.exists() else None
    source = load_source(str(run.path), choose_device(None))
    labels = list(range(min(source.classes, spec.sample_classes)))
    settings = Settings(spec.cfg, spec.top_k, spec.top_p)
    images = grid_of_classes(source, labels, spec.samples_per_class, 0, settings)
    names = [source.label(c) for c in labels] if source.class_names else None
    write_grid(images, path, zoom=max(1, 96 // images.shape[2]), names=names)
    say(f"samples of {config.name}: {path}")
    return path


def growth(study: Study, kept: Mapping[str, RunRecord]) -> Path | None:
    """The same classes and seeds from every size (rows) at every checkpoint kept (columns).

    This is figure 7 of the VAR paper (arXiv:2404.02905). Each size is shown by its first healthy
    run. Where checkpoints were removed, an earlier picture stays; None without one, and where no
    run has two checkpoints.
    """
    path, spec = study.report / "growth.png", study.spec
    sizes: dict[int, tuple[Config, RunFolder]] = {}
    for config, run in _healthy(study, kept):
        sizes.setdefault(config.model.depth, (config, run))
    steps = {
        depth: [c.step for c in checkpoints(run.checkpoints)] for depth, (_, run) in sizes.items()
    }
    if path.exists() and not all(steps.values()):
        return path
    sizes = {depth: found for depth, found in sizes.items() if steps[depth]}
    if max((len(steps[depth]) for depth in sizes), default=0) < 2:
        return None
    settings = Settings(spec.cfg, spec.top_k, spec.top_p)
    rows, names = [], []
    for depth, (config, run) in sizes.items():
        tiles: list[np.ndarray] = []
        text: dict[int, str] = {}
        flops = kept[config.name].flops_exact
        for step in steps[depth]:
            source = load_source(str(run.path), choose_device(None), step=step)
            labels = list(range(min(source.classes, CLASSES)))
            # The label stands above the first image of the checkpoint.
            text[len(tiles)] = f"d{depth}, {flops * step / max(steps[depth]):.2g} FLOP"
            tiles += list(grid_of_classes(source, labels, 1, 0, settings)[:, 0])
        rows.append(tiles)
        names.append(text)
    blank, columns = np.full_like(rows[0][0], 255), max(map(len, rows))
    grid = np.stack([np.stack([*tiles, *[blank] * (columns - len(tiles))]) for tiles in rows])
    write_grid(grid, path, zoom=max(1, 64 // blank.shape[0]), names=names)
    say(f"sizes and compute: {path}")
    return path
