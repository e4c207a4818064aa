"""The token grids of the scales, `patch_nums`: a whole number for the side of a square grid, (height, width) for another."""

from __future__ import annotations

from collections.abc import Sequence

PatchNum = int | tuple[int, int]


def grid(patch_num: PatchNum) -> tuple[int, int]:
    """(height, width)."""
    return (patch_num, patch_num) if isinstance(patch_num, int) else (patch_num[0], patch_num[1])


def cells(patch_nums: Sequence[PatchNum]) -> list[int]:
    """Tokens of each scale."""
    return [height * width for height, width in map(grid, patch_nums)]


def length(patch_nums: Sequence[PatchNum]) -> int:
    """Tokens of all scales, L."""
    return sum(cells(patch_nums))


def normal(patch_nums: Sequence[int | Sequence[int]]) -> tuple[PatchNum, ...]:
    """Squares as a number, others as a pair: equal schedules are equal, whatever file they come from."""
    sides = [(p, p) if isinstance(p, int) else tuple(p) for p in patch_nums]
    return tuple(side[0] if side[0] == side[1] else (side[0], side[1]) for side in sides)
