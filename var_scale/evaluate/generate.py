"""Many images from one model: a folder of PNGs, WebDataset shards, or the npz of the ADM evaluator.

The random numbers of image j of class c depend only on (seed, c, j). Batch size, processes, devices
and interruptions do not change it, except for the rounding of matrix products, which may depend on
the batch size on some devices. Work is divided into units: missing units are sampled, existing ones
kept.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from var_scale.data.shards import Sample, ShardSet
from var_scale.errors import UserError
from var_scale.evaluate.source import Source
from var_scale.files import (
    atomic_file,
    canonical_hash,
    first_difference,
    read_json,
    remove_tree,
    write_json,
    write_text,
)
from var_scale.model.graphs import Graphs
from var_scale.model.sampling import Draws, Hooks, OneGenerator, SeedPerImage, Settings, sample
from var_scale.progress import progress, say

UNIT = 256
"""Number of images that are written together."""
RECORD = "samples.json"
ROUNDING = "round(255 x)"
PAPER = Settings(cfg=1.5, top_k=900, top_p=0.96)
"""The protocol of the paper's tables: 50 images per class, PNG."""


def seed_of(seed: int, label: int, number: int) -> int:
    """Key of image `number` of class `label` (-1: none): 64 bits of seed, 24 of label, 40 of
    number."""
    if not 0 <= number < 2**40:
        raise UserError(
            f"image {number}: at most 2^40 images per class are possible",
            code="evaluate.image-number",
        )
    return (int(seed) % 2**64) << 64 | (label + 1) % 2**24 << 40 | number


def to_uint8(images_B3HW: torch.Tensor) -> np.ndarray:
    """[0, 1] to uint8 (B, H, W, 3), rounded."""
    return (images_B3HW.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw(
    source: Source,
    labels: Sequence[int],
    numbers: Sequence[int],
    seed: int,
    settings: Settings,
    hooks: Hooks | None = None,
    draws: Draws | None = None,
) -> np.ndarray:
    """Sample uint8 images (B, H, W, 3) of classes `labels` (-1: none), the `numbers`-th of each.

    Each image has its own seed, unless `draws` is given.
    """
    var = source.var
    device = var.lvl_1L.device
    label_B = torch.tensor(
        [var.num_classes if label < 0 else label for label in labels], device=device
    )
    seeds = [seed_of(seed, label, number) for label, number in zip(labels, numbers, strict=True)]
    return to_uint8(sample(var, label_B, settings, draws or SeedPerImage(seeds), hooks).images)


def grid_of_classes(
    source: Source,
    labels: Sequence[int],
    per_class: int,
    seed: int,
    settings: Settings,
    batch: int = 32,
    one_generator: bool = False,
) -> np.ndarray:
    """Sample uint8 images (classes, per_class, H, W, 3).

    With `one_generator` a single generator, seeded with `seed`, draws all batches in turn; a single
    batch then equals that of the official `autoregressive_infer_cfg` with g_seed.
    """
    wanted = [(label, number) for label in labels for number in range(per_class)]
    parts = [wanted[start : start + batch] for start in range(0, len(wanted), batch)]
    draws = OneGenerator(source.var.rng.manual_seed(seed)) if one_generator else None
    made = [
        draw(source, [c for c, _ in part], [n for _, n in part], seed, settings, draws=draws)
        for part in parts
    ]
    images = np.concatenate(made)
    return images.reshape(len(labels), per_class, *images.shape[1:])


@dataclass(frozen=True)
class Job:
    """What to sample: `count` images, divided equally among `classes`, class by class.

    Raises:
        UserError: there is nothing to sample.
    """

    classes: tuple[int, ...]
    count: int
    seed: int
    settings: Settings

    def __post_init__(self) -> None:
        if self.count < 1 or not self.classes:
            raise UserError(
                f"{self.count} images of {len(self.classes)} classes: nothing to sample",
                code="evaluate.nothing-to-draw",
            )

    def image(self, i: int) -> tuple[int, int]:
        """Class of image i, and its number within the class."""
        k = i * len(self.classes) // self.count
        first = -(-k * self.count // len(self.classes))
        return self.classes[k], i - first

    @property
    def units(self) -> int:
        """Number of units of UNIT images; the last may be smaller."""
        return -(-self.count // UNIT)

    def unit(self, number: int) -> range:
        """The images of a unit."""
        return range(number * UNIT, min((number + 1) * UNIT, self.count))


def whole_png(path: Path) -> bool:
    """Whether the file exists and ends like a PNG."""
    try:
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            return file.read(4) == b"IEND"
    except OSError:
        return False


class PngFolder:
    """000000.png, 000001.png, ... and labels.csv."""

    def __init__(self, out: Path, job: Job):
        self.out, self.job = out, job

    def missing(self, unit: int) -> list[int]:
        return [i for i in self.job.unit(unit) if not whole_png(self.out / f"{i:06d}.png")]

    def write(self, unit: int, indices: Sequence[int], images: np.ndarray) -> None:
        for i, image in zip(indices, images, strict=True):
            with atomic_file(self.out / f"{i:06d}.png") as file:
                Image.fromarray(image).save(file, "PNG")

    def finish(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "class"])
        writer.writerows([f"{i:06d}.png", self.job.image(i)[0]] for i in range(self.job.count))
        write_text(self.out / "labels.csv", text.getvalue())


class Shards:
    """WebDataset shards of PNGs with a manifest, as `data shard` writes them."""

    def __init__(self, out: Path, job: Job, classes: int, what: dict[str, Any]):
        self.job = job
        self.set = ShardSet(out, "image", "samples", classes, UNIT, {"name": "samples", **what})

    def missing(self, unit: int) -> list[int]:
        return (
            []
            if self.set.complete or self.set.record(unit) is not None
            else list(self.job.unit(unit))
        )

    def write(self, unit: int, indices: Sequence[int], images: np.ndarray) -> None:
        samples = []
        for i, image in zip(indices, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            samples.append(Sample(buffer.getvalue(), max(self.job.image(i)[0], 0), "png"))
        self.set.write(unit, samples)

    def finish(self) -> None:
        if not self.set.complete:
            self.set.finish(self.job.units)


class Npz:
    """The file of the ADM evaluator: arr_0 uint8 (N, H, W, 3) and arr_1 classes, assembled from
    parts beside it."""

    def __init__(self, out: Path, job: Job):
        self.out, self.job, self.parts = out, job, out.with_name(f"{out.name}.parts")
        if out.exists() and not zipfile.is_zipfile(out):  # truncated or damaged: sampled again
            out.unlink()

    def missing(self, unit: int) -> list[int]:
        return (
            []
            if self.out.exists() or (self.parts / f"{unit:06d}.npy").exists()
            else list(self.job.unit(unit))
        )

    def write(self, unit: int, indices: Sequence[int], images: np.ndarray) -> None:
        with atomic_file(self.parts / f"{unit:06d}.npy") as file:
            np.save(file, images)

    def finish(self) -> None:
        if self.out.exists():
            return
        files = [self.parts / f"{unit:06d}.npy" for unit in range(self.job.units)]
        shape = np.load(files[0], mmap_mode="r").shape[1:]
        labels = np.array([self.job.image(i)[0] for i in range(self.job.count)], dtype=np.int64)
        with (
            atomic_file(self.out) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                head = {"descr": "|u1", "fortran_order": False, "shape": (self.job.count, *shape)}
                np.lib.format.write_array_header_1_0(entry, head)  # type: ignore[arg-type]
                for path in files:
                    entry.write(np.load(path).tobytes())
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)
        remove_tree(self.parts)


Output = PngFolder | Shards | Npz
"""A form of the output. `missing` returns the images of a unit that do not exist yet, `write` adds
images of a unit, and `finish` completes the output when all units exist."""


def describe(source: Source, job: Job, kind: str) -> dict[str, Any]:
    """Everything that the images depend on. It is stored beside them, and compared before more are
    added."""
    settings = {f"settings.{key}": value for key, value in asdict(job.settings).items()}
    return {
        **source.what,
        "format": kind,
        "classes": len(job.classes),
        "classes_hash": canonical_hash(list(job.classes))[:16],
        "count": job.count,
        "seed": job.seed,
        "rounding": ROUNDING,
        **settings,
    }


def generate(
    source: Source,
    job: Job,
    out: Path,
    kind: str,
    batch: int,
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Sample the missing images of every `part[1]`-th unit from `part[0]` on.

    Returns:
        whether all images of the job exist, so that `out` is complete.

    Raises:
        UserError: `out` holds images of another model or other settings, or other files.
    """
    what = describe(source, job, kind)
    record = out.with_name(f"{out.name}.json") if kind == "npz" else out / RECORD
    if record.exists():
        if changed := first_difference(read_json(record, "description of samples"), what):
            key, before, now = changed
            raise UserError(
                f"{out}: holds images with other settings ({key} was {before} and is now {now}); "
                "choose another place",
                code="evaluate.other-settings",
            )
    elif out.is_file() or (
        out.is_dir() and any(not p.name.startswith(".") and p.name != RECORD for p in out.iterdir())
    ):
        raise UserError(
            f"{out}: exists and does not come from this command (it has no {record.name}); choose "
            "another place",
            code="evaluate.out-in-use",
        )
    else:
        write_json(record, what)
    output: Output = (
        PngFolder(out, job)
        if kind == "png"
        else Npz(out, job)
        if kind == "npz"
        else Shards(out, job, source.classes, {key: str(value) for key, value in what.items()})
    )
    source.var.graphs = Graphs()
    mine = [
        (unit, indices)
        for unit in range(part[0], job.units, part[1])
        if (indices := output.missing(unit))
    ]
    label = "sample" if part[1] == 1 else f"sample, part {part[0]}/{part[1]}"
    with progress(label, sum(len(indices) for _, indices in mine), "images") as bar:
        done = 0
        for unit, indices in mine:
            images = []
            for start in range(0, len(indices), batch):
                chosen = [job.image(i) for i in indices[start : start + batch]]
                labels, numbers = zip(*chosen, strict=True)
                images.append(draw(source, labels, numbers, job.seed, job.settings))
                done += len(chosen)
                bar.update(done)
            output.write(unit, indices, np.concatenate(images))
    if any(output.missing(unit) for unit in range(job.units)):
        say(
            f"{out}: part {part[0]}/{part[1]} is finished; the last part to end assembles the "
            "output"
        )
        return False
    output.finish()
    return True
