"""The embedded image set: pictures of `shapes`, generated as shards in any number.

Image i of a split depends only on (settings, split, i).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from var_scale.data.manifest import Manifest
from var_scale.data.shapes import KINDS, ShapesSettings, draw_shapes
from var_scale.data.shards import ShardSetWriter
from var_scale.data.workers import in_workers
from var_scale.errors import UserError
from var_scale.machine import cores
from var_scale.progress import progress
from var_scale.scales import grid

SPLITS = {"train": 1, "val": 2, "test": 3}
BLOCK = 256
"""Images drawn together. Part of the definition of the set: changing it changes every image."""


def _block(settings: ShapesSettings, split: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (BLOCK, H, W, 3) and labels (BLOCK,) of block `block`."""
    labels = (block * BLOCK + np.arange(BLOCK)) % settings.num_classes
    return draw_shapes(settings, (settings.seed, split << 48 | block), labels), labels


def shapes_images(
    settings: ShapesSettings, split: str, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images [start, start+count) of a split: uint8 (count, H, W, 3) and int64 labels (count,).

    The splits "train", "val" and "test" are disjoint.

    Raises:
        UserError: another split, a size below 1, or more classes than `KINDS`.
    """
    if split not in SPLITS:
        raise UserError(
            f"shapes: split {split!r} is not one of {', '.join(SPLITS)}", code="data.split-name"
        )
    if min(*grid(settings.size), settings.num_classes, settings.looks) < 1:
        raise UserError(
            f"shapes: size, num_classes and looks must be at least 1, but are {settings}",
            code="data.shapes-settings",
        )
    if settings.num_classes > len(KINDS):
        raise UserError(
            f"shapes: num_classes is {settings.num_classes}, but there are {len(KINDS)} kinds of "
            "pictures",
            code="data.shapes-settings",
        )
    images = np.empty((count, *grid(settings.size), 3), np.uint8)
    labels = np.empty(count, np.int64)
    for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        block_images, block_labels = _block(settings, SPLITS[split], block)
        first, last = max(start, block * BLOCK), min(start + count, (block + 1) * BLOCK)
        wanted = slice(first - start, last - start)
        drawn = slice(first - block * BLOCK, last - block * BLOCK)
        images[wanted], labels[wanted] = block_images[drawn], block_labels[drawn]
    return images, labels


def png_bytes(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) as a PNG with little compression."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png", compress_level=1)
    return stream.getvalue()


def _encoded(job: tuple[ShapesSettings, str, int, int]) -> list[tuple[bytes, int]]:
    """In a worker: the PNGs and labels of one job."""
    images, labels = shapes_images(*job)
    return [(png_bytes(image), int(label)) for image, label in zip(images, labels, strict=True)]


def _encoded_blocks(
    jobs: list[tuple[ShapesSettings, str, int, int]], processes: int
) -> Iterator[list[tuple[bytes, int]]]:
    """The blocks in order, drawn by `processes` forked workers."""
    if processes == 1 or len(jobs) < 2 * processes:
        yield from map(_encoded, jobs)
        return
    yield from in_workers(_encoded, jobs, processes, ordered=True)


def write_shapes(
    folder: Path,
    split: str,
    count: int,
    settings: ShapesSettings,
    samples_per_shard: int = 4096,
    processes: int | None = None,
) -> Manifest:
    """Write images [0, count) of a split as PNG shards with progress. It continues a killed run,
    and returns at once if the folder is complete.

    `processes`: workers (default: the cores this process may use, at most 8); the bytes do not
    depend on it.

    Raises:
        UserError: the folder holds other data.
    """
    names = list(KINDS[: settings.num_classes])
    source = {"name": "shapes", "count": count, "class_names": names, **asdict(settings)}
    with ShardSetWriter(
        folder, "image", split, settings.num_classes, samples_per_shard, source
    ) as writer:
        if writer.complete:
            return writer.finish()
        done = writer.completed_samples()
        edges = (
            [done, *range((done // BLOCK + 1) * BLOCK, count, BLOCK), count] if done < count else []
        )
        jobs = [(settings, split, start, stop - start) for start, stop in pairwise(edges)]
        blocks = _encoded_blocks(jobs, processes or min(8, cores()))
        with progress(f"shapes {split}", count, "images", initial=done) as bar:
            for block in blocks:
                for data, label in block:
                    writer.add_image(data, label)
                done += len(block)
                bar.update(done)
        return writer.finish()
