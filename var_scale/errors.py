"""The one exception a person is meant to read."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """One line that says what is wrong, where, and how to mend it. The command exits with code 2, or the `code` of a run that failed."""

    code = 2


class Preempted(KeyboardInterrupt):
    """Stopped on request after the run saved: the same command continues. The command exits with code 85."""


def require_grids(**values: Sequence[object]) -> None:
    """UserError for a list of token grids that is empty or holds anything but a side or (height, width)."""
    for name, grids in values.items():
        sides = [side for patch_num in grids for side in (patch_num if isinstance(patch_num, tuple | list) else (patch_num,))]
        require_positive(**{name: sides})
        if any(isinstance(patch_num, tuple | list) and len(patch_num) != 2 for patch_num in grids):
            raise UserError(f"{name} is {grids!r}; give the side of each grid, or (height, width)")


def require_positive(**values: object) -> None:
    """UserError for a size that is not a whole number from 1 up, or a list of sizes that is empty."""
    for name, value in values.items():
        items = list(value) if isinstance(value, tuple | list) else [value]
        if not items or any(isinstance(item, bool) or not isinstance(item, int) or item < 1 for item in items):
            raise UserError(f"{name} is {value!r}; give whole numbers from 1 up")
