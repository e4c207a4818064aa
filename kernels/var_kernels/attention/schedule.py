"""The keys that each query sees, and the tiles that follow from it, as plain integers; cached."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

OFFICIAL_SCALES = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""The scales of the official models at 256 and 512 pixels, by their number of tokens."""

Pattern = str | int
"""What a query sees. full: its own scale and all earlier ones (the paper); own: its own scale; a
number k: its own scale and the k - 1 before it."""


@dataclass(frozen=True, eq=False)
class Visible:
    """Query i sees the keys [lo[i], hi[i]).

    Instances are compared by identity, which makes them quick keys of caches: `scales` and
    `everything` return the same instance for the same arguments.
    """

    lo: tuple[int, ...]
    hi: tuple[int, ...]
    keys: int

    @cached_property
    def transposed(self) -> Visible:
        """Key j is seen by the queries [lo[j], hi[j]): a range, because lo and hi never fall."""
        assert list(self.lo) == sorted(self.lo) and list(self.hi) == sorted(self.hi), (
            "lo and hi must not fall"
        )
        lo = tuple(bisect_right(self.hi, key) for key in range(self.keys))
        hi = tuple(bisect_right(self.lo, key) for key in range(self.keys))
        return Visible(lo, hi, len(self.lo))

    def pairs(self) -> int:
        """(query, key) pairs that are computed."""
        return sum(hi - lo for lo, hi in zip(self.lo, self.hi, strict=True))


def counts(patch_nums: Sequence[int | tuple[int, int]]) -> tuple[int, ...]:
    """Tokens of each scale: a number is the side of a square grid, a pair is (height, width)."""
    return tuple(side * side if isinstance(side, int) else side[0] * side[1] for side in patch_nums)


def scales(patch_nums: Sequence[int | tuple[int, int]], pattern: Pattern = "full") -> Visible:
    """The visible keys of every token of a scale schedule."""
    return scales_of(counts(patch_nums), pattern)


@lru_cache(maxsize=64)
def scales_of(tokens: tuple[int, ...], pattern: Pattern = "full") -> Visible:
    """`scales` from the number of tokens of each scale."""
    back = (
        {"full": len(tokens), "own": 1}.get(pattern, pattern)
        if isinstance(pattern, str)
        else pattern
    )
    if not isinstance(back, int) or back < 1:
        raise ValueError(
            f"attention pattern {pattern!r} is not known; use full, own, or the number of scales "
            "that a query sees (1 or more)"
        )
    starts = [0]
    for count in tokens:
        starts.append(starts[-1] + count)
    lo, hi = [], []
    for number, count in enumerate(tokens):
        lo += [starts[max(0, number + 1 - back)]] * count
        hi += [starts[number + 1]] * count
    return Visible(tuple(lo), tuple(hi), starts[-1])


@lru_cache(maxsize=256)
def everything(queries: int, keys: int) -> Visible:
    """Every query sees every key: a scale that is being sampled, with all keys so far."""
    return Visible((0,) * queries, (keys,) * queries, keys)


def tile_rows(visible: Visible, block: int) -> list[tuple[int, int, int, int, int, int]]:
    """Cut the rows into tiles of at most `block` rows, at the borders between scales.

    Rows that see the same keys need no mask inside a tile. Small neighbouring scales share a tile.
    A tile is (start, stop, lo, hi, full_lo, full_hi); every row of it sees [full_lo, full_hi). The
    longest tiles come first, so that the last programs of a launch are short.
    """
    rows = len(visible.lo)
    borders = [
        0,
        *(
            i
            for i in range(1, rows)
            if (visible.lo[i], visible.hi[i]) != (visible.lo[i - 1], visible.hi[i - 1])
        ),
        rows,
    ]
    cuts: list[tuple[int, int]] = []
    for start, stop in pairwise(borders):
        if cuts and stop - cuts[-1][0] <= block:
            cuts[-1] = (cuts[-1][0], stop)
        else:
            cuts += [(i, min(i + block, stop)) for i in range(start, stop, block)]
    tiles = []
    for start, stop in cuts:
        lo, hi = visible.lo[start:stop], visible.hi[start:stop]
        tiles.append((start, stop, min(lo), max(hi), max(lo), min(hi)))
    return sorted(tiles, key=lambda tile: tile[3] - tile[2], reverse=True)


@dataclass(frozen=True)
class Tiles:
    """A tile table on a device: table (T, 6), lo and hi of every row, all int32."""

    table: Tensor
    lo: Tensor
    hi: Tensor


@lru_cache(maxsize=512)
def tiles_on(visible: Visible, block: int, device: torch.device) -> Tiles:
    """`tile_rows` as tensors, cached for each schedule and device."""
    table, lo, hi = (
        torch.tensor(v, dtype=torch.int32, device=device)
        for v in (tile_rows(visible, block), visible.lo, visible.hi)
    )
    return Tiles(table, lo, hi)


def mask(visible: Visible, device: torch.device | str = "cpu") -> Tensor:
    """(queries, keys) bool, true where the pair is computed: for the reference, and for back-ends
    that need a tensor."""
    lo, hi = (torch.tensor(v, device=device)[:, None] for v in (visible.lo, visible.hi))
    keys = torch.arange(visible.keys, device=device)[None, :]
    return (keys >= lo) & (keys < hi)
