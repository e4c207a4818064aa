"""What a command finds in images that is odd but no error: counted, and named once at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from var_scale.progress import say

ONE_BASED = ", or subtract 1 from labels that count from 1"
"""A hint for errors about a class that is just above the largest."""


@dataclass
class Tally:
    """How often something was found, and the first place."""

    count: int = 0
    first: str = ""

    def add(self, place: str, count: int = 1) -> None:
        """Count `count` more, the first of which is at `place`."""
        if count:
            self.first = self.first or place
            self.count += count


@dataclass
class Findings:
    """All that was found."""

    unused: Tally = field(default_factory=Tally)
    """members of tars that end in no sample"""
    rotated: Tally = field(default_factory=Tally)
    """images with an EXIF orientation, which is not applied"""

    def merge(self, record: Mapping[str, Any]) -> None:
        """Add the findings in a record, which has the form of `asdict`."""
        for name, tally in vars(self).items():
            if name in record:
                tally.add(record[name]["first"], record[name]["count"])

    def say(self, where: object) -> None:
        """Print a line for each kind that was found."""
        if self.unused.count:
            say(
                f"warning: {where}: ignored {self.unused.count} members of the tars that belong to "
                f"no sample, such as {self.unused.first}"
            )
        if count := self.rotated.count:
            say(
                f"warning: {where}: ignored the EXIF orientation of {count} "
                f"image{'s' * (count > 1)}, as the official code does, such as "
                f"{self.rotated.first}; `data shard` with --apply-exif writes them upright"
            )


def from_one(smallest: int, largest: int) -> str:
    """A remark on labels that seem to count from 1, so that class 0 stays empty; empty for others.

    Args:
        smallest, largest: of all labels of a split.
    """
    if smallest != 1:
        return ""
    return (
        f"no label is 0, they go from 1 to {largest}, so class 0 stays empty; if they count from "
        "1, subtract 1 from each"
    )


def say_from_one(where: object, smallest: int, largest: int) -> None:
    """Print the remark of `from_one`, if any."""
    if remark := from_one(smallest, largest):
        say(f"warning: {where}: {remark}")
