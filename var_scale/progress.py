"""Progress with remaining time: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_INTERVAL_SECONDS = 5.0


def say(text: str) -> None:
    """Print one line at once, so that logs follow the work."""
    print(text, flush=True)


def print_table(table: Table) -> None:
    """Print a rich table; where the output is no terminal, so wide that no column is cut."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min, 3.5 days."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 72 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"


class Progress:
    """A counter towards `total`. Remaining time comes from the work done since the start, not counting `initial`."""

    def __init__(self, label: str, total: float, unit: str, initial: float = 0):
        self.label, self.total, self.unit = label, total, unit
        self.initial = self.done = initial
        self.start = self.last_print = time.monotonic()
        self.note = self.printed = ""

    def update(self, done: float, note: str = "") -> None:
        """`done` is the count so far (not an increment); `note` a short text such as a loss."""
        self.done, self.note = done, note
        self._show(final=False)

    def remaining_seconds(self) -> float | None:
        """Estimated seconds left, None before anything was done."""
        gained = self.done - self.initial
        if gained <= 0:
            return None
        return (time.monotonic() - self.start) / gained * (self.total - self.done)

    def line(self) -> str:
        """The state as one plain line."""
        left = self.remaining_seconds()
        parts = [f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit}"]
        if self.note:
            parts.append(self.note)
        if left is not None and self.done < self.total:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _show(self, final: bool) -> None:
        now = time.monotonic()
        if final or now - self.last_print >= PLAIN_INTERVAL_SECONDS:
            self.last_print = now
            if self.line() != self.printed:
                self.printed = self.line()
                say(self.printed)

    def close(self) -> None:
        """Show the last state."""
        self._show(final=True)


class _Bar(Progress):
    """The same on a terminal, drawn by rich."""

    def __init__(self, label: str, total: float, unit: str, initial: float = 0):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(label, total, unit, initial)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit + "  {task.fields[note]}"),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.rich = RichProgress(*columns)
        self.task = self.rich.add_task(label, total=total, completed=int(initial), note="")
        self.rich.start()

    def _show(self, final: bool) -> None:
        self.rich.update(self.task, completed=self.done, note=self.note)
        if final:
            self.rich.stop()


class _Hidden(Progress):
    """The same, not shown: another rank shows it."""

    def _show(self, final: bool) -> None:
        """Nothing."""


@contextmanager
def progress(label: str, total: float, unit: str, initial: float = 0, shown: bool = True) -> Iterator[Progress]:
    """`with progress("tokenise", 8192, "images") as bar: ... bar.update(done)`."""
    bar = (_Hidden if not shown else _Bar if sys.stdout.isatty() else Progress)(label, total, unit, initial)
    try:
        yield bar
    finally:
        bar.close()
