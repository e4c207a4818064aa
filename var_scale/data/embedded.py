"""The embedded image set `leaves`: class-conditional dead leaves, generated in any number.

An image is a stack of occluding superellipses, front to back. The radius follows p(r) ~ r^-alpha
(Lee, Mumford and Huang 2001: dead leaves have the statistics of natural images). The species of a
leaf (colour, outline, grating, angle) comes from a dictionary with Zipf frequencies: many skills of
power-law frequency give a power law of the loss in the number of parameters. The class determines
alpha, the aspect ratio, and which species are frequent. Image i depends only on
(settings, split, i).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from var_scale.data.manifest import Manifest
from var_scale.data.order import philox
from var_scale.data.shards import ShardSetWriter
from var_scale.data.workers import in_workers
from var_scale.errors import UserError
from var_scale.machine import cores
from var_scale.progress import progress
from var_scale.scales import grid

SPLITS = {"train": 1, "val": 2, "test": 3}
BLOCK = 256
"""Images drawn together. Part of the definition of the set: changing it changes every image."""
POWERS = (0.8, 1.0, 2.0, 8.0)
"""Outline |u|^p + |v|^p < 1: pinched star, diamond, ellipse, rounded box."""
ALPHAS = (2.0, 3.0, 4.0)
ASPECTS = (1.0, 1.6, 2.4, 3.4)
SMALLEST, LARGEST = 0.11, 0.55  # radii in units of the shorter side


@dataclass(frozen=True)
class LeavesSettings:
    """The definition of the set: side in pixels (or height and width), number of classes, species
    in the dictionary, leaves per image, Zipf exponent, seed."""

    size: int | tuple[int, int] = 32
    num_classes: int = 10
    species: int = 512
    leaves: int = 8
    zipf: float = 1.1
    seed: int = 0


@dataclass(frozen=True)
class _Dictionary:
    """The species (S,), and how each class (C,) ranks them."""

    colour: np.ndarray  # (S, 3) float32 in [0, 255]
    power: np.ndarray  # (S,) index into POWERS
    angle: np.ndarray  # (S,) radians
    amplitude: np.ndarray  # (S,) of the grating, share of the colour
    frequency: np.ndarray  # (S, 2) of the grating along and across the leaf, radians per side
    by_rank: np.ndarray  # (C, S) the species of each frequency rank
    cumulative: np.ndarray  # (S,) Zipf distribution function over ranks


@lru_cache(maxsize=8)
def _dictionary(settings: LeavesSettings) -> _Dictionary:
    """The species and their frequencies, drawn from the seed of the set alone."""
    rng = philox((settings.seed, 0))
    count = settings.species
    direction = rng.uniform(0, np.pi, count)
    wave = 2 * np.pi * rng.uniform(2, 6, count)
    weights = np.arange(1, count + 1, dtype=np.float64) ** -settings.zipf
    return _Dictionary(
        colour=(255 * rng.beta(0.8, 0.8, (count, 3))).astype(np.float32),
        power=rng.integers(0, len(POWERS), count),
        angle=rng.uniform(0, np.pi, count).astype(np.float32),
        amplitude=(rng.uniform(0.15, 0.5, count) * (rng.random(count) < 0.6)).astype(np.float32),
        frequency=np.stack([wave * np.cos(direction), wave * np.sin(direction)], 1).astype(
            np.float32
        ),
        by_rank=np.stack([rng.permutation(count) for _ in range(settings.num_classes)]),
        cumulative=np.cumsum(weights) / weights.sum(),
    )


def _radii(rng: np.random.Generator, alpha: np.ndarray, leaves: int) -> np.ndarray:
    """Inverse distribution function of p(r) ~ r^-alpha on [SMALLEST, LARGEST]: (B, leaves)."""
    power = (1 - alpha)[:, None]
    low, high = SMALLEST**power, LARGEST**power
    return (low + rng.random((len(alpha), leaves)) * (high - low)) ** (1 / power)


def _block(settings: LeavesSettings, split: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (BLOCK, H, W, 3) and labels (BLOCK,) of block `block`."""
    book, rng = _dictionary(settings), philox((settings.seed, split << 48 | block))
    count, leaves, size = BLOCK, settings.leaves, grid(settings.size)
    labels = (block * BLOCK + np.arange(count)) % settings.num_classes
    radius = _radii(rng, np.take(ALPHAS, labels % len(ALPHAS)), leaves)
    aspect = np.sqrt(np.take(ASPECTS, (labels // len(ALPHAS)) % len(ASPECTS)))[:, None] * np.exp(
        rng.normal(0, 0.1, (count, leaves))
    )
    rank = np.searchsorted(book.cumulative, rng.random((count, leaves))).clip(
        0, settings.species - 1
    )
    species = book.by_rank[labels[:, None], rank]
    angle = book.angle[species] + rng.normal(0, 0.25, (count, leaves))
    centre = (
        rng.uniform(-0.05, 1.05, (2, count, leaves)) * np.reshape(size[::-1], (2, 1, 1)) / min(size)
    )
    phase = rng.uniform(0, 2 * np.pi, (count, leaves)).astype(np.float32)

    # Coordinates of a pixel in the frame of a leaf: linear in x and y, u = u0 + ux*x + uy*y.
    # Divided by the radius: |u| < 1 inside.
    cos, sin = np.cos(angle), np.sin(angle)
    along, across = radius * aspect, radius / aspect
    frames = np.stack(
        [
            cos / along,
            sin / along,
            -(centre[0] * cos + centre[1] * sin) / along,
            -sin / across,
            cos / across,
            (centre[0] * sin - centre[1] * cos) / across,
        ],
        -1,
    ).astype(np.float32)
    power = book.power[species]
    power[:, -1] = -1  # the last leaf is the background: it fills the rest
    owner, u, v = _fill(frames, power, size)

    # (B, H*W) the leaf of each pixel, counted over the whole block.
    flat = np.arange(count)[:, None] * leaves + owner
    kind = species.ravel()[flat]
    scale = np.stack([along, across], -1).reshape(-1, 2).astype(np.float32)[flat]
    wave = book.frequency[kind]
    grating = 1 + book.amplitude[kind] * np.sin(
        wave[..., 0] * u * scale[..., 0] + wave[..., 1] * v * scale[..., 1] + phase.ravel()[flat]
    )
    images = (book.colour[kind] * grating[..., None]).clip(0, 255).astype(np.uint8)
    return images.reshape(count, *size, 3), labels


def _fill(
    frames: np.ndarray, power: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Front to back: which leaf owns each pixel (B, H*W), and the coordinates u, v of the pixel in
    the frame of that leaf.

    frames (B, leaves, 6) holds ux, uy, u0, vx, vy, v0; power (B, leaves) the outline, -1 for one
    that covers everything. Only pixels that no leaf covers yet are tested.
    """
    count, leaves, _ = frames.shape
    pixels = size[0] * size[1]
    down, across = (((np.arange(side) + 0.5) / min(size)).astype(np.float32) for side in size)
    x, y = np.tile(across, size[0] * count), np.tile(np.repeat(down, size[1]), count)
    owner = np.zeros(count * pixels, np.int64)
    out_u, out_v = np.empty(count * pixels, np.float32), np.empty(count * pixels, np.float32)
    free, image = np.arange(count * pixels, dtype=np.int32), np.repeat(np.arange(count), pixels)
    for leaf in range(leaves):
        ux, uy, u0, vx, vy, v0 = np.ascontiguousarray(frames[:, leaf].T)
        u = ux.take(image) * x + uy.take(image) * y + u0.take(image)
        v = vx.take(image) * x + vy.take(image) * y + v0.take(image)
        inside = _inside(np.abs(u), np.abs(v), power[:, leaf].take(image))
        covered, left = np.flatnonzero(inside), np.flatnonzero(~inside)
        hit = free[covered]
        owner[hit], out_u[hit], out_v[hit] = leaf, u[covered], v[covered]
        free, image, x, y = free[left], image[left], x[left], y[left]
    shape = (count, pixels)
    return owner.reshape(shape), out_u.reshape(shape), out_v.reshape(shape)


def _inside(u: np.ndarray, v: np.ndarray, power: np.ndarray) -> np.ndarray:
    """|u|^p + |v|^p < 1 for each pixel; u, v >= 0; power indexes POWERS, -1 is always inside."""
    inside = power < 0
    near = np.flatnonzero((np.maximum(u, v) < 1) & ~inside)  # every outline is in the unit box
    u, v, power = u[near], v[near], power[near]
    u2, v2 = u * u, v * v
    value = np.where(power == 2, u2 + v2, u + v)
    star, box = np.flatnonzero(power == 0), np.flatnonzero(power == 3)
    value[star] = u[star] ** np.float32(POWERS[0]) + v[star] ** np.float32(POWERS[0])
    value[box] = u2[box] ** 4 + v2[box] ** 4
    inside[near] = value < 1
    return inside


def leaves_images(
    settings: LeavesSettings, split: str, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images [start, start+count) of a split: uint8 (count, H, W, 3) and int64 labels (count,).

    The splits "train", "val" and "test" are disjoint.

    Raises:
        UserError: another split, or a size below 1.
    """
    if split not in SPLITS:
        raise UserError(
            f"leaves: split {split!r} is not one of {', '.join(SPLITS)}", code="data.split-name"
        )
    if min(*grid(settings.size), settings.num_classes, settings.species, settings.leaves) < 1:
        raise UserError(
            f"leaves: size, num_classes, species and leaves must be at least 1, but are {settings}",
            code="data.leaves-settings",
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


def _encoded(job: tuple[LeavesSettings, str, int, int]) -> list[tuple[bytes, int]]:
    """In a worker: the PNGs and labels of one job."""
    images, labels = leaves_images(*job)
    return [(png_bytes(image), int(label)) for image, label in zip(images, labels, strict=True)]


def _encoded_blocks(
    jobs: list[tuple[LeavesSettings, str, int, int]], processes: int
) -> Iterator[list[tuple[bytes, int]]]:
    """The blocks in order, drawn by `processes` forked workers."""
    if processes == 1 or len(jobs) < 2 * processes:
        yield from map(_encoded, jobs)
        return
    yield from in_workers(_encoded, jobs, processes, ordered=True)


def write_leaves(
    folder: Path,
    split: str,
    count: int,
    settings: LeavesSettings,
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
    source = {"name": "leaves", "count": count, **asdict(settings)}
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
        with progress(f"leaves {split}", count, "images", initial=done) as bar:
            for block in blocks:
                for data, label in block:
                    writer.add_image(data, label)
                done += len(block)
                bar.update(done)
        return writer.finish()
