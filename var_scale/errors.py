"""The one exception a person is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """One line that says what is wrong, where, and how to mend it. The command exits with code 2, or the `code` of a run that failed."""

    code = 2


class Preempted(KeyboardInterrupt):
    """Stopped on request after the run saved: the same command continues. The command exits with code 85."""


def require_positive(**values: object) -> None:
    """UserError for a size that is not a whole number from 1 up, or a list of sizes that is empty."""
    for name, value in values.items():
        items = list(value) if isinstance(value, tuple | list) else [value]
        if not items or any(isinstance(item, bool) or not isinstance(item, int) or item < 1 for item in items):
            raise UserError(f"{name} is {value!r}; give whole numbers from 1 up")
