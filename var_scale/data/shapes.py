"""Pictures with a name: ten kinds of shapes and textures, drawn in any number.

A picture is a plain background with a shape or a texture in front of it. The class is the kind.
Position, size, angle and light vary. A look is a pair of colours from a dictionary. The frequencies
of the looks follow a Zipf law, and each class ranks them in its own order. A model learns frequent
looks early, and rare ones only if it is large and has seen many pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from var_scale.data.order import philox
from var_scale.scales import grid

KINDS = (
    "disc",
    "ring",
    "square",
    "triangle",
    "star",
    "cross",
    "stripes",
    "checks",
    "dots",
    "house",
)
"""The classes, in order."""
CONTRAST = 0.3  # smallest difference in luminance between the colours of a look
LUMINANCE = np.array([0.299, 0.587, 0.114])

Field = np.ndarray
"""Float (B, pixels): distance to an outline, negative inside."""


@dataclass(frozen=True)
class ShapesSettings:
    """The definition of the set: side in pixels (or height and width), number of classes (the first
    of `KINDS`), pairs of colours in the dictionary, Zipf exponent of their frequencies, seed."""

    size: int | tuple[int, int] = 32
    num_classes: int = len(KINDS)
    looks: int = 32
    zipf: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class _Dictionary:
    """Colours in [0, 1] of the looks (K,), and how each class (C,) ranks them."""

    front: np.ndarray  # (K, 3)
    back: np.ndarray  # (K, 3)
    by_rank: np.ndarray  # (C, K) the look of each frequency rank
    cumulative: np.ndarray  # (K,) Zipf distribution function over ranks


@lru_cache(maxsize=8)
def _dictionary(settings: ShapesSettings) -> _Dictionary:
    """Looks and their frequencies, drawn from the seed of the set alone."""
    rng, count = philox((settings.seed, 0)), settings.looks
    colours = 0.1 + 0.8 * rng.random((count, 2, 3))
    while len(dull := np.flatnonzero(abs(np.diff(colours @ LUMINANCE)[:, 0]) < CONTRAST)):
        colours[dull] = 0.1 + 0.8 * rng.random((len(dull), 2, 3))
    weights = np.arange(1, count + 1, dtype=np.float64) ** -settings.zipf
    return _Dictionary(
        front=colours[:, 0],
        back=colours[:, 1],
        by_rank=np.stack([rng.permutation(count) for _ in range(settings.num_classes)]),
        cumulative=np.cumsum(weights) / weights.sum(),
    )


def _disc(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 0.95


def _ring(u: Field, v: Field) -> Field:
    return abs(np.hypot(u, v) - 0.73) - 0.22


def _square(u: Field, v: Field) -> Field:
    return np.maximum(abs(u), abs(v)) - 0.8


def _triangle(u: Field, v: Field) -> Field:
    """Equilateral, pointing up."""
    return np.maximum(0.866 * abs(u) - 0.5 * (v - 0.2), v - 0.2) - 0.52


def _star(u: Field, v: Field) -> Field:
    """Five points: the distance to the edge from a tip at radius 1 to a notch at radius 0.5, in
    the sector of that tip."""
    sector = 2 * np.pi / 5
    radius, angle = np.hypot(u, v), np.arctan2(u, -v)
    angle = abs((angle + sector / 2) % sector - sector / 2)
    along = 0.5 * np.cos(sector / 2) - 1, 0.5 * np.sin(sector / 2)
    x, y = radius * np.cos(angle) - 1, radius * np.sin(angle)
    return (x * along[1] - y * along[0]) / np.hypot(*along)


def _cross(u: Field, v: Field) -> Field:
    long, short = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    return np.maximum(long - 0.95, short - 0.36)


def _house(u: Field, v: Field) -> Field:
    """A box with a door, below a roof that is a little wider."""
    box = np.maximum(abs(u) - 0.72, abs(v - 0.4) - 0.5)
    roof = np.maximum(0.67 * (abs(u) / 0.9 - v - 1), v)
    door = np.maximum(abs(u) - 0.2, 0.35 - v)
    return np.maximum(np.minimum(box, roof), -door)


OUTLINES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "house": _house,
}
"""Shapes by their distance in units of the radius; u points right and v down."""


@dataclass(frozen=True)
class _Canvas:
    """The pixels of a picture (1, P), in units of its shorter side."""

    x: Field
    y: Field
    width: float
    height: float
    pixels: int
    """of the shorter side"""


def _canvas(size: tuple[int, int]) -> _Canvas:
    shorter = min(size)
    y, x = (((np.arange(side) + 0.5) / shorter) for side in size)
    return _Canvas(
        np.tile(x, size[0])[None],
        np.repeat(y, size[1])[None],
        size[1] / shorter,
        size[0] / shorter,
        shorter,
    )


def _shape(kind: str, canvas: _Canvas, rng: np.random.Generator, count: int) -> Field:
    """One shape of any size near the middle."""
    radius = rng.uniform(0.34, 0.45, (count, 1))
    angle = rng.uniform(-0.15, 0.15, (count, 1))
    x, y = (
        side / 2 + rng.uniform(-0.6, 0.6, (count, 1)) * (side / 2 - radius)
        for side in (canvas.width, canvas.height)
    )
    x, y = canvas.x - x, canvas.y - y
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius
    return OUTLINES[kind](u, v) * radius


def _bands(position: Field, period: Field) -> Field:
    """Every second half of a period is inside."""
    return (abs((position / period) % 1 - 0.5) - 0.25) * period


def _stripes(canvas: _Canvas, rng: np.random.Generator, count: int) -> Field:
    """Bands that lie flat or slope."""
    slope, phase = rng.uniform(-0.3, 0.3, (count, 1)), rng.uniform(0, 1, (count, 1))
    across = canvas.x * np.sin(slope) + canvas.y * np.cos(slope)
    return _bands(across + phase, rng.uniform(0.46, 0.58, (count, 1)))


def _checks(canvas: _Canvas, rng: np.random.Generator, count: int) -> Field:
    """A board of four by four cells of a quarter of the side each, almost in its place."""
    period = rng.uniform(0.48, 0.52, (count, 1))
    x, y = (
        _bands(at + 0.125 + rng.uniform(-0.04, 0.04, (count, 1)), period)
        for at in (canvas.x, canvas.y)
    )
    return np.minimum(np.maximum(x, -y), np.maximum(-x, y))


def _dots(canvas: _Canvas, rng: np.random.Generator, count: int) -> Field:
    """One to four small discs, each in a quarter of its own."""
    radius, nearest = rng.uniform(0.11, 0.15, (count, 1)), np.full((count, 1), np.inf)
    for number, (right, down) in enumerate(((0, 0), (1, 1), (1, 0), (0, 1))):
        x, y = (
            (0.28 + 0.44 * far + rng.uniform(-0.08, 0.08, (count, 1))) * side
            for far, side in ((right, canvas.width), (down, canvas.height))
        )
        distance = np.hypot(canvas.x - x, canvas.y - y) - radius
        shown = rng.random((count, 1)) < (1.0 if number == 0 else 0.75)
        nearest = np.where(shown, np.minimum(nearest, distance), nearest)
    return nearest


TEXTURES = {"stripes": _stripes, "checks": _checks, "dots": _dots}


def draw_shapes(settings: ShapesSettings, key: tuple[int, int], labels: np.ndarray) -> np.ndarray:
    """Pictures of classes `labels` (B,), uint8 (B, H, W, 3); they depend on the settings, the key
    of the random stream and the labels alone."""
    book, rng, count = _dictionary(settings), philox(key), len(labels)
    size = grid(settings.size)
    canvas = _canvas(size)
    rank = np.searchsorted(book.cumulative, rng.random(count)).clip(0, settings.looks - 1)
    look = book.by_rank[labels, rank]
    distance = np.empty((count, canvas.x.shape[1]))
    for label in range(settings.num_classes):
        kind, of_class = KINDS[label], np.flatnonzero(labels == label)
        if texture := TEXTURES.get(kind):
            distance[of_class] = texture(canvas, rng, len(of_class))
        else:
            distance[of_class] = _shape(kind, canvas, rng, len(of_class))
    cover = (0.5 - distance * canvas.pixels).clip(0, 1)[..., None]  # an edge is one pixel wide
    light = 1 + rng.normal(0, 0.03, (2, count, 1, 1))
    slope = rng.uniform(-0.2, 0.2, (count, 1)) * (canvas.y - canvas.height / 2)
    back = book.back[look][:, None] * (light[0] + slope[..., None])
    front = book.front[look][:, None] * light[1]
    pictures = back + (front - back) * cover
    return (255 * pictures.clip(0, 1)).round().astype(np.uint8).reshape(count, *size, 3)
