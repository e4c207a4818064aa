"""Token grids of the scales (`patch_nums`): the side of a square grid, or (height, width)."""

from __future__ import annotations

from collections.abc import Sequence

PatchNum = int | tuple[int, int]
PATCH_NUMS_256: tuple[PatchNum, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512: tuple[PatchNum, ...] = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PATCH_NUMS_1024: tuple[PatchNum, ...] = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
"""The official grids, by the side of the images in pixels."""


def grid(patch_num: PatchNum) -> tuple[int, int]:
    """A grid as (height, width)."""
    return (patch_num, patch_num) if isinstance(patch_num, int) else (patch_num[0], patch_num[1])


def cells(patch_nums: Sequence[PatchNum]) -> list[int]:
    """Number of tokens of each scale."""
    return [height * width for height, width in map(grid, patch_nums)]


def length(patch_nums: Sequence[PatchNum]) -> int:
    """Number of tokens of all scales together, L."""
    return sum(cells(patch_nums))


def normal(patch_nums: Sequence[int | Sequence[int]]) -> tuple[PatchNum, ...]:
    """The grids, squares as a number and others as a pair: equal grids compare equal."""
    sides = [(p, p) if isinstance(p, int) else tuple(p) for p in patch_nums]
    return tuple(side[0] if side[0] == side[1] else (side[0], side[1]) for side in sides)
