"""`var-scale sample` and `edit`: checking what was requested, and carrying it out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from var_scale.errors import UserError
from var_scale.evaluate.edit import box_mask, edit, image_mask, read_picture
from var_scale.evaluate.generate import PAPER, RECORD, Job, generate, grid_of_classes
from var_scale.evaluate.pictures import steps_picture, write_grid
from var_scale.evaluate.source import Source
from var_scale.model.sampling import Settings
from var_scale.progress import say
from var_scale.scales import grid

FIRST_CLASSES, STEPS_CLASSES, PAPER_COUNT = 10, 8, 50_000
"""Classes of a grid, and classes of the picture of all scales, unless they are given; images of the
paper's protocol."""
FORMS = "a grid is a .png file, an npz is a .npz file, png and shards are folders"


@dataclass(frozen=True)
class SampleRequest:
    """What to sample and where to. `format` is grid, png, shards or npz; by default `out`
    decides."""

    out: Path
    format: str | None
    settings: Settings
    seed: int
    classes: str | None
    per_class: int
    count: int | None
    batch: int
    paper: bool
    one_generator: bool
    processes: int
    part: tuple[int, int]
    steps_picture: Path | None
    zoom: int
    device: str | None


def run_request(request: SampleRequest, load: Callable[[], Source]) -> None:
    """Sample, on several processes if requested; the same command continues what was interrupted.

    Raises:
        UserError: options contradict each other, the output is in use, or a process failed.
    """
    kind = _check(request)
    if request.paper:
        if request.settings != Settings():
            raise UserError(
                "--paper: sets guidance, filters and temperature; leave yours out, or --paper",
                code="evaluate.options-conflict",
            )
        request = replace(request, count=request.count or PAPER_COUNT, settings=PAPER)
    children = _start_parts(request) if request.processes > 1 else []
    try:
        _sample(request, kind, load(), children)
    except BaseException:  # after an error or a signal no part continues alone
        for child in children:
            child.terminate()
        raise


def _sample(
    request: SampleRequest, kind: str, source: Source, children: list[subprocess.Popen[bytes]]
) -> None:
    """Sample the part of this process, then put together what the children have sampled."""
    out = request.out
    first = source.classes if request.count else min(FIRST_CLASSES, source.classes)
    classes = list(range(first))
    if request.classes:
        classes = source.find(request.classes.split(","))
    if request.steps_picture:
        shown = classes[:STEPS_CLASSES]
        steps_picture(
            source, shown, request.seed, request.settings, request.steps_picture, request.zoom
        )
        of = f", the first {len(shown)} of {len(classes)} classes" if shown != classes else ""
        say(f"coarse to fine{of}: {request.steps_picture}")
    if kind == "grid":
        images = grid_of_classes(
            source,
            classes,
            request.per_class,
            request.seed,
            request.settings,
            request.batch,
            request.one_generator,
        )
        names = [source.label(number) for number in classes]
        write_grid(images, out, zoom=request.zoom, names=names)
        say(f"{len(classes)} classes x {request.per_class} images: {out}")
        return
    count = request.count or request.per_class * len(classes)
    job = Job(tuple(classes), count, request.seed, request.settings)
    part = (0, request.processes) if children else request.part
    done = generate(source, job, out, kind, request.batch, part)
    if children:
        if failed := sum(1 for child in children if child.wait()):
            raise UserError(
                f"{out}: {failed} of {request.processes} processes failed; the same command "
                "samples what is missing",
                code="evaluate.process-failed",
            )
        done = done or generate(source, job, out, kind, request.batch, part)
    if done:
        say(f"{job.count:,} images of {len(classes)} classes: {out}")


def _check(request: SampleRequest) -> str:
    """The kind of output: grid, png, shards or npz. Refuses combinations without a meaning."""
    out, suffix = request.out, request.out.suffix.lower()
    default = {".npz": "npz", ".png": "grid", "": "png"}
    kind = request.format or default.get(suffix, "")
    wanted = {"grid": ".png", "npz": ".npz"}.get(kind, "")
    if suffix != wanted:
        raise UserError(f"--out {out}: {FORMS}", code="evaluate.out-form")
    if out.is_dir() and suffix:
        raise UserError(
            f"--out {out}: is a folder; choose another name for the file", code="evaluate.out-form"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(
            f"--out {out}: is a folder with other files; choose another", code="evaluate.out-in-use"
        )
    if kind == "grid":
        refuse_among_samples(out, "--out")
    if request.steps_picture:
        refuse_among_samples(request.steps_picture, "--steps-picture")
        if request.steps_picture.resolve() == out.resolve():
            raise UserError(
                "--steps-picture and --out: are the same file; give two names",
                code="evaluate.options-conflict",
            )
    many = request.count or request.paper or request.part != (0, 1) or request.processes > 1
    if kind == "grid" and many:
        raise UserError(
            f"--out {out}: is one picture; give a folder or an .npz for --count, --paper, --part "
            "and --processes",
            code="evaluate.options-conflict",
        )
    if request.one_generator and kind != "grid":
        raise UserError(
            f"--one-generator: is for a grid; the images of {out} have one seed each, so that "
            "parts can be sampled anywhere",
            code="evaluate.options-conflict",
        )
    if request.processes > 1 and request.part != (0, 1):
        raise UserError(
            "--processes and --part: give only one of them", code="evaluate.options-conflict"
        )
    return kind


def refuse_among_samples(path: Path, option: str) -> None:
    """Refuse a picture that would be, or replace, one of the samples of a folder."""
    if (path.parent / RECORD).exists():
        raise UserError(
            f"{option} {path}: this folder holds samples; choose another place",
            code="evaluate.out-in-use",
        )


def _start_parts(request: SampleRequest) -> list[subprocess.Popen[bytes]]:
    """Start the parts 1/N, 2/N, ... as processes, each on a GPU of its own if there are several;
    part 0 is left for this process."""
    gpus = torch.cuda.device_count()
    command, skip = [], False
    for word in sys.argv[1:]:  # this very command, without --processes
        skip, dropped = word == "--processes", skip
        if not (skip or dropped or word.startswith("--processes=")):
            command.append(word)
    children = []
    for rank in range(1, request.processes):
        device = ["--device", f"cuda:{rank % gpus}"] if gpus and not request.device else []
        part = ["--part", f"{rank}/{request.processes}"]
        line = [sys.executable, "-m", "var_scale.cli", *command, *part, *device]
        # Only this process shows progress: all parts are equally large.
        env = {**os.environ, "PYTHONSAFEPATH": "1"}
        children.append(subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL))
    return children


@dataclass(frozen=True)
class EditRequest:
    """Which part of which picture to redraw. Exactly one of `box` and `mask` is given."""

    image: Path
    out: Path
    box: tuple[float, float, float, float] | None
    mask: Path | None
    keep: bool
    as_class: str | None
    count: int
    seed: int
    settings: Settings
    zoom: int


def run_edit(request: EditRequest, load: Callable[[], Source]) -> None:
    """Redraw a part of a picture, and write the picture and its edits side by side.

    Raises:
        UserError: options contradict each other, or nothing would be redrawn.
    """
    if (request.box is None) == (request.mask is None):
        raise UserError(
            "edit: give either --box TOP,LEFT,BOTTOM,RIGHT or --mask PICTURE",
            code="evaluate.options-conflict",
        )
    read = [path.resolve() for path in (request.image, request.mask) if path]
    if request.out.resolve() in read:
        raise UserError(
            f"--out {request.out}: is a picture that is read; choose another name",
            code="evaluate.out-in-use",
        )
    refuse_among_samples(request.out, "--out")
    source = load()
    label = -1
    if request.as_class:
        (label,) = source.find([request.as_class], "--as-class")
    image = read_picture(request.image, source.var.vae_proxy[0].image_size)
    if request.box:
        mask = box_mask(request.box, grid(source.var.patch_nums[-1]))
    else:
        assert request.mask
        mask = image_mask(request.mask)
    redraw = 1 - mask if request.keep else mask
    if not (redraw > 0.5).any():
        raise UserError(
            "--keep: the box or mask covers the whole picture, so nothing would be redrawn",
            code="evaluate.nothing-to-draw",
        )
    drawn = edit(source, image, redraw, label, request.count, request.seed, request.settings)
    pictures = np.concatenate([image[None], drawn])[None]
    names = [{0: "given", 1: source.label(label)}]
    write_grid(pictures, request.out, zoom=request.zoom, names=names)
    say(f"{request.count} edits, {source.label(label)}: {request.out}")
